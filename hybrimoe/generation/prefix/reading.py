"""What a prompt begins with on disk, beyond what memory has: found at once, read at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from hybrimoe.generation.prefix.disk import DiskLevel
from hybrimoe.generation.prefix.keys import Kind, name_between, name_of, next_key

__all__ = ["Part", "Reading", "parts_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """A file that a prompt needs: tokens `first` to `first + len(token_ids)` of it. name: of the file."""

    kind: Kind
    name: str
    token_ids: tuple[int, ...]
    first: int

    @property
    def end(self) -> int:
        """Tokens of the prompt up to the end of this part."""
        return self.first + len(self.token_ids)


class Reading:
    """Files that threads read for a prompt. What has come is taken by `contents`, while others are still read.

    path: the blocks that memory has of it, which whoever takes contents extends.
    """

    def __init__(
        self, disk: DiskLevel, prompt_ids: Sequence[int], parts: Sequence[Part], path: list[Any]
    ) -> None:  # fmt: skip
        self.prompt_ids = prompt_ids
        self.path = path
        self._parts = deque(parts)
        self._files = disk.read_each([(part.name, part.token_ids) for part in parts])
        self._results = deque(self._files.results)

    @property
    def has_ended(self) -> bool:
        """Whether all that will come was taken."""
        return not self._results

    def waits(self, wait_s: float) -> bool:
        """Whether nothing new has come after so long."""
        return bool(self._results) and bool(wait([self._results[0]], wait_s).not_done)

    def contents(self) -> list[tuple[Part, Any]]:
        """What has come since last, in the order of the prompt, up to the first file that was gone or damaged, after
        which nothing more will."""
        read: list[tuple[Part, Any]] = []
        while self._results and self._results[0].done():
            part, content = self._parts.popleft(), self._results.popleft().result()
            if content is None:
                self.give_up()
                break
            read.append((part, content))
        return read

    def give_up(self) -> None:
        """Nothing more is needed."""
        self._files.waiting.clear()
        self._results.clear()


def parts_of(
    disk: DiskLevel, keys: Sequence[bytes], prompt_ids: Sequence[int], *, block_tokens: int, n_known: int,
    n_in_memory: int, needs_states: bool, max_bytes: int,
) -> list[Part]:  # fmt: skip
    """What to read of a prompt, so that more of it is known than memory gives; empty where there is no more.

    keys: of the texts before the first token and after each full block that memory has. n_known: tokens that can be
    taken up from memory now; n_in_memory: tokens whose keys and values memory has, which a model that `needs_states`
    can take up only where states stand. max_bytes: of files that may be read.
    """
    blocks, ends, n_found = _blocks(disk, keys, prompt_ids, block_tokens, max_bytes)
    n_there = max(n_in_memory, n_found)
    starts = [*keys, *ends]
    if needs_states:
        state = _last_state(disk, starts, prompt_ids[: min(n_there, len(prompt_ids) - 1)], block_tokens)
        if state is None or state.end <= n_known:
            return []
        return [*(part for part in blocks if part.first < state.end), state]
    if n_there <= n_known:
        blocks = []
    return [*blocks, *_logits(disk, starts, prompt_ids, block_tokens, n_there)]


def _blocks(
    disk: DiskLevel, keys: Sequence[bytes], prompt_ids: Sequence[int], block_tokens: int, max_bytes: int
) -> tuple[list[Part], list[bytes], int]:
    """The blocks that follow the last of `keys`, the last of which may have other tokens, too; the keys after those
    that are full and of the prompt alone; and the tokens of the prompt up to there."""
    found: list[Part] = []
    ends: list[bytes] = []
    key, first = keys[-1], block_tokens * (len(keys) - 1)
    while True:
        rest = tuple(prompt_ids[first : first + block_tokens])
        own_key = next_key(key, rest)
        token_ids, alike, name = rest, len(rest), name_between("block", len(rest), key, own_key)
        if not rest or not disk.has(name):
            token_ids, alike = disk.likest(key, rest)
            name = name_of("block", key, token_ids)
        max_bytes -= disk.size(name)
        if alike == 0 or max_bytes < 0:
            return found, ends, first
        found.append(Part("block", name, token_ids, first))
        if alike < block_tokens:
            return found, ends, first + alike
        ends.append(own_key)
        key, first = own_key, first + block_tokens


def _last_state(
    disk: DiskLevel, starts: Sequence[bytes], prompt_ids: Sequence[int], block_tokens: int
) -> Part | None:  # fmt: skip
    """The states that stand after most of `prompt_ids`; starts: the key before each block."""
    for number in range(len(starts) - 1, -1, -1):
        first = block_tokens * number
        rest = tuple(prompt_ids[first : first + block_tokens])
        n = disk.longest("state", starts[number], rest)
        if n:
            return Part("state", name_of("state", starts[number], rest[:n]), rest[:n], first)
    return None


def _logits(
    disk: DiskLevel, starts: Sequence[bytes], prompt_ids: Sequence[int], block_tokens: int, n_there: int
) -> list[Part]:
    """What was kept of a whole prompt that comes again."""
    number = (len(prompt_ids) - 1) // block_tokens
    if n_there < len(prompt_ids) or number >= len(starts):
        return []
    first = block_tokens * number
    rest = tuple(prompt_ids[first:])
    part = Part("state", name_of("state", starts[number], rest), rest, first)
    return [part] if disk.has(part.name) else []
