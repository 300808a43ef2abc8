"""HybriMoE: hybrid CPU-GPU scheduling for Mixture-of-Experts models that do not fit the GPU.

>>> import hybrimoe
>>> model = hybrimoe.load("/models/Qwen3-30B-A3B")          # meta device -> inject -> stream weights
>>> injection = hybrimoe.inject(loaded_transformers_model)  # or any model that is already in memory

Importing this package loads neither torch nor transformers; they come with the first use of `load` or `inject`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.checkpoint.loading import load
    from hybrimoe.config.deploy import DeployConfig, load_config
    from hybrimoe.errors import HybriMoEError
    from hybrimoe.injection import Injection, inject

    __version__: str

_HOMES = {
    "load": "hybrimoe.checkpoint",
    "inject": "hybrimoe.injection",
    "Injection": "hybrimoe.injection",
    "DeployConfig": "hybrimoe.config.deploy",
    "load_config": "hybrimoe.config.deploy",
    "HybriMoEError": "hybrimoe.errors",
}

__all__ = ["DeployConfig", "HybriMoEError", "Injection", "__version__", "inject", "load", "load_config"]


def __getattr__(name: str) -> Any:
    """Imports the public names from their homes on first use."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'hybrimoe' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes 50 ms, a sixth of `hybrimoe --help`

    try:
        return version("hybrimoe")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0+source"


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
