"""Names of what is kept on disk: a chain of hashes over the tokens, which begins with the identity of the model."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybrimoe.generation.images.tokens import has_images, identities

__all__ = [
    "KEY_BYTES",
    "KINDS",
    "NAME",
    "Kind",
    "Record",
    "first_key",
    "n_alike",
    "name_between",
    "name_of",
    "next_key",
    "own_key",
]

Kind = Literal["block", "state"]
KINDS: tuple[Kind, ...] = ("block", "state")
FORMAT = "2 "
"""Of the files, which are not found by the names that another one had."""
COMPARED = 256
"""Tokens of two texts that are compared at once."""
KEY_BYTES = 16
"""Of a hash: two texts have the same one with a probability of 2 ** -128."""
NAME = re.compile(r"(?P<kind>block|state)(?P<n>\d+)-(?P<parent>[0-9a-f]{32})-(?P<own>[0-9a-f]{32})\.kv")
"""Kind, number of tokens, the key of the text before them, the key of the text with them."""


def first_key(identity: str) -> bytes:
    """The key of the empty text of a model; identity: says of all that its keys and values depend on."""
    return hashlib.sha256((FORMAT + identity).encode()).digest()[:KEY_BYTES]


def next_key(key: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a text that goes on with `token_ids` after the text with `key`."""
    of_images = repr(identities(token_ids)).encode() if has_images(token_ids) else b""
    return hashlib.sha256(key + array("q", token_ids).tobytes() + of_images).digest()[:KEY_BYTES]


def name_of(kind: Kind, parent: bytes, token_ids: Sequence[int]) -> str:
    """The file of a block, or of the states after its tokens; parent: the key of the text before."""
    return name_between(kind, len(token_ids), parent, next_key(parent, token_ids))


def name_between(kind: Kind, n_tokens: int, parent: bytes, own: bytes) -> str:
    """The same, given the key of the text with the tokens, too."""
    return f"{kind}{n_tokens}-{parent.hex()}-{own.hex()}.kv"


def own_key(name: str) -> bytes:
    """The key of the text up to the end of what a file holds."""
    match = NAME.fullmatch(name)
    assert match is not None
    return bytes.fromhex(match["own"])


def n_alike(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    least, count = min(len(left), len(right)), 0
    while count < least and left[count : count + COMPARED] == right[count : count + COMPARED]:
        count += COMPARED
    while count < least and left[count] == right[count]:
        count += 1
    return min(count, least)


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
