"""Errors that only loading raises."""

from pathlib import Path

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


def unreadable(file: Path, error: OSError | ValueError, damaged: str) -> str:
    """Why a file gave no JSON, and what to do. damaged: what to do where it was read, and is none."""
    if isinstance(error, PermissionError):
        return f"{file} may not be read by this user; change its rights (chmod), or those of its folder"
    if isinstance(error, OSError):
        return f"{file} cannot be read: {error.strerror or error}"
    return f"{file} cannot be read as JSON: {error}; {damaged}"


POINTER, PAGES = b"version https://git-lfs", (b"<!doctype", b"<html")


def stands_for(file: Path) -> str | None:
    """What lies in the place of a file that was not fetched itself, and what to do; None for other files."""
    if file.is_symlink() and not file.exists():
        return f"{file} is a link to {file.readlink()}, which is not there; fetch it again"
    if not file.is_file():  # a pipe would be waited for
        return None
    try:
        with file.open("rb") as opened:
            first = opened.read(len(POINTER)).lower()
    except OSError:
        return None
    if first == POINTER:
        return f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {file.parent}"
    if first.startswith(PAGES):
        return f"{file} holds a web page, not the file itself; fetch it again, from its download link"
    return None
