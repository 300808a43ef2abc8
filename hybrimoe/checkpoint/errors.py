"""Errors that only loading raises."""

from hybrimoe.errors import CheckpointError


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint in a format or quantisation that is not read; the message says which ones are."""


class PackedFileWarning(UserWarning):
    """The packed experts could not be written, so the next start reads the checkpoint again. Nothing is lost."""


class TiedEmbeddingsWarning(UserWarning):
    """The output layer was taken to be the input embeddings: the checkpoint has no weights for it, and config.json does
    not say."""


class LeftOutWarning(UserWarning):
    """Weights of the checkpoint that its model has no place for were left out; the message says which."""


SHOWN_NAMES = 3  # names that an error lists before "and N more"


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
