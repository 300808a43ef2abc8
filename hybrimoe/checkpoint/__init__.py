"""Loading: from a checkpoint on disk to a model whose experts live in a packed store."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.checkpoint.converting import convert
    from hybrimoe.checkpoint.errors import PackedFileWarning, UnsupportedCheckpointError
    from hybrimoe.checkpoint.loading import load
    from hybrimoe.checkpoint.pack.checksums import verify_pack
    from hybrimoe.checkpoint.pack.experts import PackedFile
    from hybrimoe.checkpoint.source import model_path
    from hybrimoe.checkpoint.tokenizer import load_tokenizer
    from hybrimoe.injection.restore import rebuild_experts

_MODULE_OF = {
    "PackedFile": "hybrimoe.checkpoint.pack.experts",
    "PackedFileWarning": "hybrimoe.checkpoint.errors",
    "UnsupportedCheckpointError": "hybrimoe.checkpoint.errors",
    "convert": "hybrimoe.checkpoint.converting",
    "load": "hybrimoe.checkpoint.loading",
    "load_tokenizer": "hybrimoe.checkpoint.tokenizer",
    "model_path": "hybrimoe.checkpoint.source",
    "rebuild_experts": "hybrimoe.injection.restore",
    "verify_pack": "hybrimoe.checkpoint.pack.checksums",
}

__all__ = [
    "PackedFile",
    "PackedFileWarning",
    "UnsupportedCheckpointError",
    "convert",
    "load",
    "load_tokenizer",
    "model_path",
    "rebuild_experts",
    "verify_pack",
]


def __getattr__(name: str) -> Any:
    """Imports public names from their modules on first use: torch and transformers take seconds."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
