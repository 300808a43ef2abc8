"""Why a model or a layer keeps transformers' way."""

from __future__ import annotations

from hybrimoe.errors import HybriMoEError


class NotCompiled(HybriMoEError):
    """A part of a model that the compiled step does not know, or computes otherwise; the text is the reason."""
