"""The one error of the demo model's training."""

from hybrimoe.errors import HybriMoEError

__all__ = ["CorpusError"]


class CorpusError(HybriMoEError, ValueError):
    """A corpus that is missing, not in the expected format, or too short to train on."""
