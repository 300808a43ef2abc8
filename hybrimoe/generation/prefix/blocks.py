"""The prefix cache: a tree of blocks of tokens in host memory, over everything that prompts and replies computed.

A block holds keys and values of up to 64 tokens, copied from the cache of the reply that computed them, and hangs on
the block of the tokens before. So a path from the root is a text, conversations share the blocks of what they begin
with alike, and any prompt finds the longest beginning that is kept. A reply computes in a cache of its own, into which
that beginning is copied: nothing here changes while it is read. Below it there may be a disk level: it keeps what a
reply leaves and what memory gives up, and a prompt reads from there what memory does not have.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cpu_kernels.host.memory import page_aligned
from hybrimoe.generation.images.tokens import kept
from hybrimoe.generation.prefix.disk import DiskLevel
from hybrimoe.generation.prefix.keys import Record, n_alike, name_of, next_key
from hybrimoe.generation.prefix.reading import Reading, parts_of
from hybrimoe.generation.prefix.states import Checkpoint, is_bounded, is_plain, reason_against_blocks

__all__ = ["BLOCK_TOKENS", "Block", "Known", "PrefixTree"]

BLOCK_TOKENS = 64
"""Tokens of a block: some MB of keys and values, whose copy costs little beside its handling."""
TOKEN_ID_BYTES = 40
"""What a token's number takes in a tuple of Python integers; blocks without keys and values have only these."""

HeldLayers = dict[int, tuple[Any, Any]]
"""Index of a layer in the cache to keys and values [1, heads, tokens, D]."""


@dataclass(slots=True, eq=False)
class Block:
    """Tokens that follow those of `parent`, with keys and values of each. Only a full block has children.

    key: of the text up to its end. checkpoints: by the number of this block's tokens after which they stand.
    """

    parent: Block | None
    key: bytes
    token_ids: tuple[int, ...] = ()
    held: HeldLayers = field(default_factory=dict)
    children: dict[tuple[int, ...], Block] = field(default_factory=dict)
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)

    def n_bytes(self) -> int:
        """Memory of keys, values and token numbers; checkpoints count for themselves."""
        tensors = [tensor for pair in self.held.values() for tensor in pair]
        return sum(int(tensor.nbytes) for tensor in tensors) + TOKEN_ID_BYTES * len(self.token_ids)

    def begins_like(self, token_ids: Sequence[int]) -> Iterator[tuple[Block, int]]:
        """The children that begin with the same token, and how many they have alike."""
        for child in self.children.values():
            if token_ids and child.token_ids[0] == token_ids[0]:
                yield child, n_alike(child.token_ids, token_ids)


@dataclass(frozen=True, slots=True)
class Known:
    """What is kept of a prompt's beginning.

    n_tokens: can be taken up, from `blocks` (of the last one perhaps a part) and, where the model has layers without
    their past, `checkpoint`; it has the logits, too, where `n_tokens` are all of the prompt. n_seen: tokens that an
    earlier sequence began with; states of their end may be missing.
    """

    n_tokens: int = 0
    n_seen: int = 0
    blocks: tuple[Block, ...] = ()
    checkpoint: Checkpoint | None = None

    def parts(self, layer: int, first: int) -> Iterator[tuple[Any, Any]]:
        """Keys and values [1, heads, n, D] of a layer, block by block, from token number `first` on."""
        begin = 0
        for block in self.blocks:
            end = min(begin + len(block.token_ids), self.n_tokens)
            if end > first:
                keys, values = block.held[layer]
                used = slice(max(first - begin, 0), end - begin)
                whole = first <= begin and end - begin == keys.shape[-2]
                yield (keys, values) if whole else (keys[..., used, :], values[..., used, :])
            begin = end


class PrefixTree:
    """Blocks of at most `max_bytes` together. One thread calls all methods; the counters may be read by any.

    What was used longest ago leaves first, ends of texts before what they continue, the states of a message's end
    before its tokens. reason: why nothing is kept of this model, None where it is. disk: what keeps more.
    """

    def __init__(self, model: Any, max_bytes: int, disk: DiskLevel | None = None) -> None:
        from cpu_kernels.step.kv_copies import warm_up_copies
        from hybrimoe.generation.growing import growing_cache

        self.max_bytes = max_bytes
        self.disk = disk
        self.reason = reason_against_blocks(model)
        self.n_bytes = self.n_blocks = 0
        self.n_hits = self.n_misses = 0
        """Prompts of which a beginning was kept, and others."""
        self.n_evicted = 0
        """Blocks that made room for others."""
        self.n_read_tokens = 0
        """Tokens of prompts that came from disk."""
        if disk is not None and self.reason is None:
            disk.make_ready(max_bytes // 4, for_replies=model.device.type == "cpu")
        layers = [] if self.reason else growing_cache(model.config.get_text_config(decoder=True)).layers
        warm_up_copies()
        self._needs_checkpoints = any(is_bounded(layer) for layer in layers)
        self._root = Block(None, b"" if disk is None else disk.first_key)
        self._by_use: OrderedDict[Block | Checkpoint, Block] = OrderedDict()
        """Blocks, and checkpoints with the block that they stand in, the longest unused first. Each use of a path goes
        through it from its end to the root: a block is always older than its parent, a checkpoint than its block."""

    def look_up(self, prompt_ids: Sequence[int]) -> Known:
        """What is kept of the beginning of a prompt, all of which counts as used now; not the prompt's last token,
        unless the logits after it are kept, too."""
        if self.reason is not None:
            return Known()
        found = self._find(prompt_ids)
        if found.n_tokens == len(prompt_ids) and (found.checkpoint is None or found.checkpoint.logits is None):
            found = self._find(prompt_ids[:-1])
        self.n_hits += found.n_tokens > 0
        self.n_misses += found.n_tokens == 0
        self._used(found.blocks, found.checkpoint)
        return found

    @property
    def memory(self) -> Callable[[int], np.ndarray]:
        """Where a reply finds memory, uint8 of so many bytes, for what it copies from here."""
        return page_aligned if self.disk is None else self.disk.ready.take

    @property
    def holds_every_token(self) -> bool:
        """Whether a text can be taken up at any of its tokens: the model has no states of its end alone."""
        return not self._needs_checkpoints

    def keep(
        self, token_ids: Sequence[int], layers: Sequence[Any], checkpoints: Sequence[Checkpoint] = (), *,
        with_end: bool = True, lasting: bool = False,
    ) -> None:  # fmt: skip
        """Copy what is not kept yet of a sequence, whose cache has `layers`.

        with_end: also the tokens of a last block that is not full; without, they wait until it is. lasting: the
        sequence is complete, so the disk level keeps it, too. A sequence that is larger than `max_bytes` leaves its
        beginning.
        """
        held = {index: layer for index, layer in enumerate(layers) if is_plain(layer) and layer.get_seq_length()}
        n_tokens = len(token_ids)
        if self.reason is not None or any(layer.get_seq_length() != n_tokens for layer in held.values()):
            return
        path = self._path(token_ids)
        end = n_tokens if with_end else n_tokens - n_tokens % BLOCK_TOKENS
        for begin in range(BLOCK_TOKENS * len(path), end, BLOCK_TOKENS):
            tokens = tuple(token_ids[begin : begin + BLOCK_TOKENS])
            parent = path[-1] if path else self._root
            block = self._covering(parent, tokens)
            if block is None:
                views = {index: _rows(layer, begin, begin + len(tokens)) for index, layer in held.items()}
                block = self._add(parent, tokens, views, path, copies=True)
            if block is None:
                break
            path.append(block)
        self._used(path)
        for checkpoint in checkpoints:
            self._remember(checkpoint, path)
        if lasting and self.disk is not None:
            self.disk.used(self._write_down(path))

    def forget(self, token_ids: Sequence[int]) -> None:
        """Let go of a text, in memory and on disk, from its end back to where another text goes on."""
        path = self._path(token_ids)
        rest = _beyond(path, token_ids)
        end = self._covering(path[-1] if path else self._root, rest) if rest else None
        if end is not None and len(end.token_ids) == len(rest):
            path.append(end)
        while path and not path[-1].children:
            block = path.pop()
            for n in list(block.checkpoints):
                self._drop_checkpoint(block, n)
            self._drop(block)
        if self.disk is not None:
            self.disk.forget(token_ids, sum(len(block.token_ids) for block in path), BLOCK_TOKENS)

    # The disk level ----------------------------------------------------------------------------------------------

    def begin_reading(self, prompt_ids: Sequence[int], n_held: int) -> Reading | None:
        """Begin to read what the disk has of the beginning of a prompt and memory has not; None where that is nothing.

        n_held: tokens of it that the reply's own cache holds already.
        """
        if self.disk is None or self.reason is not None:
            return None
        self.disk.refresh()
        path, found = self._path(prompt_ids), self._find(prompt_ids)
        parts = parts_of(
            self.disk, [self._root.key, *(block.key for block in path)], prompt_ids, block_tokens=BLOCK_TOKENS,
            n_known=found.n_tokens if self._needs_checkpoints else max(found.n_tokens, n_held),
            n_in_memory=found.n_seen, needs_states=self._needs_checkpoints,
            max_bytes=self.max_bytes - sum(block.n_bytes() for block in path),
        )  # fmt: skip
        return Reading(self.disk, prompt_ids, parts, path) if parts else None

    def take_up(self, reading: Reading) -> int:
        """Add what was read since last; returns how many tokens of the prompt that is."""
        path, n_read = reading.path, 0
        if path and path[-1] not in self._by_use:
            path[:] = self._path(reading.prompt_ids)
        for part, content in reading.contents():
            if part.kind == "state":
                end = self._covering(path[-1] if path else self._root, _beyond(path, reading.prompt_ids[: part.end]))
                self._remember(Checkpoint(part.end, **content), path if end is None else [*path, end])
            elif part.first == BLOCK_TOKENS * len(path):  # else other replies have added or driven out blocks meanwhile
                parent = path[-1] if path else self._root
                block = self._covering(parent, part.token_ids)
                if block is None:
                    block = self._add(parent, part.token_ids, content, path)
                    n_read += n_alike(part.token_ids, reading.prompt_ids[part.first : part.end])
                if block is None:
                    break
                path.append(block)
        self._used(path)
        self.n_read_tokens += n_read
        return n_read

    def taken_up(self, reading: Reading) -> Known:
        """What there is so far of a prompt that is being read: whole blocks."""
        path = [block for block in reading.path if len(block.token_ids) == BLOCK_TOKENS]
        n_tokens = min(BLOCK_TOKENS * len(path), len(reading.prompt_ids) - 1)
        return Known(n_tokens, n_tokens, tuple(path))

    def close(self, seconds: float) -> None:
        """The disk level keeps all that memory has, as far as it gets in so many seconds, and ends."""
        if self.disk is None:
            return
        blocks = list(self._root.children.values())
        for block in blocks:
            blocks += block.children.values()
        self._write_down(blocks)
        self.disk.close(seconds)

    def _write_down(self, blocks: Sequence[Block]) -> list[str]:
        """Have the disk level keep blocks and their checkpoints; returns the names of their files."""
        assert self.disk is not None
        records = [
            record
            for block in blocks
            for record in (_record(block), *(_state_record(block, n) for n in block.checkpoints))
        ]
        for record in records:
            self.disk.keep(record)
        return [record.name for record in records]

    def end_readiness(self) -> None:
        """A text has come from disk: what was made ready for it, and was not needed, is given back."""
        if self.disk is not None:
            self.disk.ready.drop()

    # Finding -----------------------------------------------------------------------------------------------------

    def _find(self, token_ids: Sequence[int]) -> Known:
        path = self._path(token_ids)
        at = BLOCK_TOKENS * len(path)
        ends = list((path[-1] if path else self._root).begins_like(token_ids[at : at + BLOCK_TOKENS]))
        return self._resumable(path, ends) if self._needs_checkpoints else _longest(path, ends)

    def _path(self, token_ids: Sequence[int]) -> list[Block]:
        """The full blocks that `token_ids` begin with."""
        path: list[Block] = []
        block = self._root
        for begin in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            child = block.children.get(tuple(token_ids[begin : begin + BLOCK_TOKENS]))
            if child is None:
                break
            path.append(child)
            block = child
        return path

    def _resumable(self, path: list[Block], ends: list[tuple[Block, int]]) -> Known:
        """The beginning up to the last checkpoint in the blocks of `path` and in one of the `ends`."""
        n_path = BLOCK_TOKENS * len(path)
        n_seen = n_path + max((alike for _, alike in ends), default=0)
        in_ends = [(n, end) for end, alike in ends for n in end.checkpoints if n <= alike]
        if in_ends:
            n, end = max(in_ends, key=lambda one: one[0])
            return Known(n_path + n, n_seen, (*path, end), end.checkpoints[n])
        for n_blocks in range(len(path), 0, -1):
            block = path[n_blocks - 1]
            if block.checkpoints:
                n = max(block.checkpoints)
                n_tokens = BLOCK_TOKENS * (n_blocks - 1) + n
                return Known(n_tokens, n_seen, tuple(path[:n_blocks]), block.checkpoints[n])
        return Known(0, n_seen)

    def _covering(self, parent: Block, token_ids: tuple[int, ...]) -> Block | None:
        """A child of `parent` that has `token_ids`, perhaps with further ones."""
        exact = parent.children.get(token_ids)
        if exact is not None or len(token_ids) == BLOCK_TOKENS:
            return exact
        return next((child for child, alike in parent.begins_like(token_ids) if alike == len(token_ids)), None)

    # Keeping -----------------------------------------------------------------------------------------------------

    def _add(
        self, parent: Block, token_ids: tuple[int, ...], held: HeldLayers, path: list[Block], *, copies: bool = False
    ) -> Block | None:
        """A new child of `parent`; None where only the blocks of `path` could make room for it. copies: of `held`."""
        token_ids = tuple(kept(token_ids))
        block = Block(parent, next_key(parent.key, token_ids), token_ids, held)
        if not self._make_room(block.n_bytes(), path):
            return None
        if copies:
            block.held = {index: tuple(_own(part) for part in parts) for index, parts in held.items()}
        for shorter, alike in list(parent.begins_like(token_ids)):
            if alike == len(shorter.token_ids):
                self._replace(shorter, block)
        parent.children[token_ids] = block
        self._by_use[block] = block
        self.n_bytes += block.n_bytes()
        self.n_blocks += 1
        return block

    def _replace(self, shorter: Block, block: Block) -> None:
        """`block` begins with all tokens of `shorter` and takes over its checkpoints."""
        for n, checkpoint in shorter.checkpoints.items():
            block.checkpoints[n] = checkpoint
            self._by_use[checkpoint] = block
        shorter.checkpoints = {}
        self._drop(shorter)
        if self.disk is not None:
            assert shorter.parent is not None
            self.disk.drop(name_of("block", shorter.parent.key, shorter.token_ids))

    def _remember(self, checkpoint: Checkpoint, path: list[Block]) -> None:
        """Keep a checkpoint in the block of `path` that has the token before it."""
        number, last = divmod(checkpoint.n_tokens - 1, BLOCK_TOKENS)
        if number >= len(path) or len(path[number].token_ids) <= last or last + 1 in path[number].checkpoints:
            return
        if self._make_room(checkpoint.n_bytes(), path):
            path[number].checkpoints[last + 1] = checkpoint
            self._by_use[checkpoint] = path[number]
            self.n_bytes += checkpoint.n_bytes()
            self._used(path[: number + 1], checkpoint)

    def _make_room(self, n_bytes: int, path: Sequence[Block]) -> bool:
        """Let go of what was used longest ago until n_bytes more fit; False where only `path` is left."""
        if self.disk is not None and self.n_bytes + n_bytes + self.disk.ready.n_bytes > self.max_bytes:
            self.disk.ready.drop()
        if self.n_bytes + n_bytes > self.max_bytes:
            self._used(path)
        while self.n_bytes + n_bytes > self.max_bytes:
            oldest = next(iter(self._by_use), None)
            if oldest is None or oldest in path:
                return False
            self._let_go(oldest)
        return True

    def _let_go(self, oldest: Block | Checkpoint) -> None:
        block = self._by_use[oldest]
        if isinstance(oldest, Block):
            self._hand_down(_record(block))
            self.n_evicted += 1
            self._drop(block)
            return
        (n,) = (n for n, one in block.checkpoints.items() if one is oldest)
        self._hand_down(_state_record(block, n))
        self._drop_checkpoint(block, n)

    def _hand_down(self, record: Record) -> None:
        """The disk level keeps what leaves memory."""
        if self.disk is not None:
            self.disk.take_over(record)

    def _drop(self, block: Block) -> None:
        """Take out a block without children and checkpoints."""
        assert block.parent is not None
        del block.parent.children[block.token_ids], self._by_use[block]
        self.n_bytes -= block.n_bytes()
        self.n_blocks -= 1

    def _drop_checkpoint(self, block: Block, n: int) -> None:
        checkpoint = block.checkpoints.pop(n)
        del self._by_use[checkpoint]
        self.n_bytes -= checkpoint.n_bytes()

    def _used(self, path: Sequence[Block], checkpoint: Checkpoint | None = None) -> None:
        """The blocks of a path, and a checkpoint in its last one, are used now."""
        if checkpoint is not None:
            self._by_use.move_to_end(checkpoint)
        for block in reversed(path):
            self._by_use.move_to_end(block)


def _longest(path: list[Block], ends: list[tuple[Block, int]]) -> Known:
    """All tokens of `path`, and those that the likest of the `ends` shares; of equals the one with the logits there."""
    n_path = BLOCK_TOKENS * len(path)
    if not ends:
        return Known(n_path, n_path, tuple(path), path[-1].checkpoints.get(BLOCK_TOKENS) if path else None)
    end, alike = max(ends, key=lambda one: (one[1], one[1] in one[0].checkpoints))
    return Known(n_path + alike, n_path + alike, (*path, end), end.checkpoints.get(alike))


def _beyond(path: Sequence[Block], token_ids: Sequence[int]) -> tuple[int, ...]:
    """Those of `token_ids` that come after the full blocks of a path."""
    return tuple(token_ids[BLOCK_TOKENS * len(path) :])


def _rows(layer: Any, begin: int, end: int) -> tuple[Any, ...]:
    """Keys and values [1, heads, n, D] of tokens of a layer, as it holds them."""
    return layer.keys[..., begin:end, :], layer.values[..., begin:end, :]


def _record(block: Block) -> Record:
    """A block as the disk level keeps it."""
    assert block.parent is not None
    name = name_of("block", block.parent.key, block.token_ids)
    return Record(name, block.token_ids, block.held, block.n_bytes(), time.time_ns())


def _state_record(block: Block, n: int) -> Record:
    """The checkpoint after `n` tokens of a block."""
    assert block.parent is not None
    one, token_ids = block.checkpoints[n], block.token_ids[:n]
    name = name_of("state", block.parent.key, token_ids)
    return Record(name, token_ids, {"layers": one.layers, "logits": one.logits}, one.n_bytes(), time.time_ns())


def _own(part: Any) -> Any:
    """A copy in host memory, of its own size."""
    import torch

    from hybrimoe.generation.growing import copy_rows

    own = torch.empty(part.shape, dtype=part.dtype)
    copy_rows(own, part)
    return own
