"""What a prompt begins with on disk, beyond what memory has: found at once, read at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from hybrimoe.generation.prefix.disk import DiskLevel
from hybrimoe.generation.prefix.keys import Kind, name_of, next_key

__all__ = ["Part", "Reading", "parts_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """A file that a prompt needs: tokens `first` to `first + len(token_ids)` of it, after the text with `key`."""

    kind: Kind
    key: bytes
    token_ids: tuple[int, ...]
    first: int

    @property
    def name(self) -> str:
        """Of the file."""
        return name_of(self.kind, self.key, self.token_ids)

    @property
    def end(self) -> int:
        """Tokens of the prompt up to the end of this part."""
        return self.first + len(self.token_ids)


class Reading:
    """Files that threads read for a prompt. Whoever has waited for its end takes `contents`."""

    def __init__(self, disk: DiskLevel, prompt_ids: Sequence[int], parts: Sequence[Part]) -> None:
        self.prompt_ids = prompt_ids
        self._parts = [(part, disk.read(part.kind, part.key, part.token_ids)) for part in parts]

    def is_complete(self, wait_s: float) -> bool:
        """Whether all is read; waits so long at most."""
        futures: list[Future[Any]] = [future for _, future in self._parts]
        return not wait(futures, wait_s).not_done

    def contents(self) -> list[tuple[Part, Any]]:
        """What was read, in the order of the prompt, up to the first file that was gone or damaged."""
        read = []
        for part, future in self._parts:
            content = future.result()
            if content is None:
                break
            read.append((part, content))
        return read


def parts_of(
    disk: DiskLevel, keys: Sequence[bytes], prompt_ids: Sequence[int], *, block_tokens: int, n_known: int,
    n_in_memory: int, needs_states: bool, max_bytes: int,
) -> list[Part]:  # fmt: skip
    """What to read of a prompt, so that more of it is known than memory gives; empty where there is no more.

    keys: of the texts before the first token and after each full block that memory has. n_known: tokens that can be
    taken up from memory now; n_in_memory: tokens whose keys and values memory has, which a model that `needs_states`
    can take up only where states stand. max_bytes: of files that may be read.
    """
    blocks, n_found = _blocks(disk, keys, prompt_ids, block_tokens, max_bytes)
    n_there = max(n_in_memory, n_found)
    starts = [*keys, *(next_key(part.key, part.token_ids) for part in blocks if part.first + block_tokens <= n_found)]
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
) -> tuple[list[Part], int]:
    """The blocks that follow the last of `keys`, the last of which may have other tokens, too, and the tokens of the
    prompt up to there."""
    found: list[Part] = []
    key, first = keys[-1], block_tokens * (len(keys) - 1)
    while True:
        rest = tuple(prompt_ids[first : first + block_tokens])
        token_ids, alike = disk.likest(key, rest)
        part = Part("block", key, token_ids, first)
        max_bytes -= disk.size(part.name)
        if alike == 0 or max_bytes < 0:
            return found, first
        found.append(part)
        if alike < block_tokens:
            return found, first + alike
        key, first = next_key(key, rest), first + block_tokens


def _last_state(
    disk: DiskLevel, starts: Sequence[bytes], prompt_ids: Sequence[int], block_tokens: int
) -> Part | None:  # fmt: skip
    """The states that stand after most of `prompt_ids`; starts: the key before each block."""
    for number in range(len(starts) - 1, -1, -1):
        first = block_tokens * number
        rest = tuple(prompt_ids[first : first + block_tokens])
        n = disk.longest("state", starts[number], rest)
        if n:
            return Part("state", starts[number], rest[:n], first)
    return None


def _logits(
    disk: DiskLevel, starts: Sequence[bytes], prompt_ids: Sequence[int], block_tokens: int, n_there: int
) -> list[Part]:
    """What was kept of a whole prompt that comes again."""
    number = (len(prompt_ids) - 1) // block_tokens
    if n_there < len(prompt_ids) or number >= len(starts):
        return []
    first = block_tokens * number
    part = Part("state", starts[number], tuple(prompt_ids[first:]), first)
    return [part] if disk.has(part.name) else []
