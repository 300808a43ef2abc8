"""Loading: from a checkpoint on disk to a model whose experts live in a packed store."""

from hybrimoe.checkpoint.errors import PackedFileWarning, UnsupportedCheckpointError
from hybrimoe.checkpoint.load import load
from hybrimoe.checkpoint.packed import PackedFile
from hybrimoe.checkpoint.rebuild import rebuild_experts
from hybrimoe.checkpoint.source import model_directory
from hybrimoe.checkpoint.tokenizer import load_tokenizer

__all__ = [
    "PackedFile",
    "PackedFileWarning",
    "UnsupportedCheckpointError",
    "load",
    "load_tokenizer",
    "model_directory",
    "rebuild_experts",
]
