"""Names of what is kept on disk: a chain of hashes over the tokens, which begins with the identity of the model."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybrimoe.generation.images.tokens import has_images, identities

__all__ = ["KEY_BYTES", "NAME", "Kind", "Record", "first_key", "n_alike", "name_of", "next_key"]

Kind = Literal["block", "state"]
KEY_BYTES = 16
"""Of a hash: two texts have the same one with a probability of 2 ** -128."""
NAME = re.compile(r"(?P<kind>block|state)(?P<n>\d+)-(?P<parent>[0-9a-f]{32})-(?P<own>[0-9a-f]{32})\.kv")
"""Kind, number of tokens, the key of the text before them, the key of the text with them."""


def first_key(identity: str) -> bytes:
    """The key of the empty text of a model; identity: says of all that its keys and values depend on."""
    return hashlib.sha256(identity.encode()).digest()[:KEY_BYTES]


def next_key(key: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a text that goes on with `token_ids` after the text with `key`."""
    of_images = repr(identities(token_ids)).encode() if has_images(token_ids) else b""
    return hashlib.sha256(key + array("q", token_ids).tobytes() + of_images).digest()[:KEY_BYTES]


def name_of(kind: Kind, parent: bytes, token_ids: Sequence[int]) -> str:
    """The file of a block, or of the states after its tokens; parent: the key of the text before."""
    return f"{kind}{len(token_ids)}-{parent.hex()}-{next_key(parent, token_ids).hex()}.kv"


def n_alike(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    for count, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return count
    return min(len(left), len(right))


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A block or a checkpoint on its way to disk. content: what the file holds, which nobody changes.

    token_ids: of the block, up to the checkpoint. used_ns: when it was last used, in ns of the system's clock.
    """

    name: str
    token_ids: tuple[int, ...]
    content: Any
    n_bytes: int
    used_ns: int
