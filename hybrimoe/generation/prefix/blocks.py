"""The prefix cache: a tree of blocks of tokens in host memory, over everything that prompts and replies computed.

A block holds keys and values of up to 64 tokens, copied from the cache of the reply that computed them, and hangs on
the block of the tokens before. So a path from the root is a text, conversations share the blocks of what they begin
with alike, and any prompt finds the longest beginning that is kept. A reply computes in a cache of its own, into which
that beginning is copied: nothing here changes while it is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    checkpoints: by the number of this block's tokens after which they stand.
    """

    parent: Block | None
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
                yield child, _n_alike(child.token_ids, token_ids)


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
                yield keys[..., used, :], values[..., used, :]
            begin = end


class PrefixTree:
    """Blocks of at most `max_bytes` together. One thread calls all methods; the counters may be read by any.

    What was used longest ago leaves first, ends of texts before what they continue, the states of a message's end
    before its tokens. reason: why nothing is kept of this model, None where it is.
    """

    def __init__(self, model: Any, max_bytes: int) -> None:
        from hybrimoe.generation.growing import growing_cache

        self.max_bytes = max_bytes
        self.reason = reason_against_blocks(model)
        self.n_bytes = self.n_blocks = 0
        self.n_hits = self.n_misses = 0
        """Prompts of which a beginning was kept, and others."""
        self.n_evicted = 0
        """Blocks that made room for others."""
        layers = [] if self.reason else growing_cache(model.config.get_text_config(decoder=True)).layers
        self._needs_checkpoints = any(is_bounded(layer) for layer in layers)
        self._root = Block(None)
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

    def keep(
        self, token_ids: Sequence[int], layers: Sequence[Any], checkpoints: Sequence[Checkpoint] = (), *,
        with_end: bool = True,
    ) -> None:  # fmt: skip
        """Copy what is not kept yet of a sequence, whose cache has `layers`.

        with_end: also the tokens of a last block that is not full; without, they wait until it is. A sequence that is
        larger than `max_bytes` leaves its beginning.
        """
        held = {index: layer for index, layer in enumerate(layers) if is_plain(layer) and layer.get_seq_length()}
        n_tokens = len(token_ids)
        if self.reason is not None or any(layer.get_seq_length() != n_tokens for layer in held.values()):
            return
        path: list[Block] = []
        for begin in range(0, n_tokens if with_end else n_tokens - n_tokens % BLOCK_TOKENS, BLOCK_TOKENS):
            tokens = tuple(token_ids[begin : begin + BLOCK_TOKENS])
            parent = path[-1] if path else self._root
            block = self._covering(parent, tokens) or self._add(parent, tokens, begin, held, path)
            if block is None:
                break
            path.append(block)
        self._used(path)
        for checkpoint in checkpoints:
            self._remember(checkpoint, path)

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
        self, parent: Block, token_ids: tuple[int, ...], begin: int, held: dict[int, Any], path: list[Block]
    ) -> Block | None:
        """A new child of `parent`; None where only the blocks of `path` could make room for it."""
        end = begin + len(token_ids)
        views = {
            index: (layer.keys[..., begin:end, :], layer.values[..., begin:end, :]) for index, layer in held.items()
        }
        block = Block(parent, token_ids, views)
        if not self._make_room(block.n_bytes(), path):
            return None
        block.held = {index: (_own(keys), _own(values)) for index, (keys, values) in views.items()}
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
        if self.n_bytes + n_bytes > self.max_bytes:
            self._used(path)
        while self.n_bytes + n_bytes > self.max_bytes:
            oldest = next(iter(self._by_use), None)
            if oldest is None or oldest in path:
                return False
            self._let_go(oldest)
        return True

    def _let_go(self, oldest: Block | Checkpoint) -> None:
        if isinstance(oldest, Block):
            self.n_evicted += 1
            self._drop(oldest)
            return
        block = self._by_use.pop(oldest)
        block.checkpoints = {n: one for n, one in block.checkpoints.items() if one is not oldest}
        self.n_bytes -= oldest.n_bytes()

    def _drop(self, block: Block) -> None:
        """Take out a block without children and checkpoints."""
        assert block.parent is not None
        del block.parent.children[block.token_ids], self._by_use[block]
        self.n_bytes -= block.n_bytes()
        self.n_blocks -= 1

    def _used(self, path: Sequence[Block], checkpoint: Checkpoint | None = None) -> None:
        """The blocks of a path, and a checkpoint in its last one, are used now."""
        if checkpoint is not None:
            self._by_use.move_to_end(checkpoint)
        for block in reversed(path):
            self._by_use.move_to_end(block)


def _longest(path: list[Block], ends: list[tuple[Block, int]]) -> Known:
    """All tokens of `path`, and those that the likest of the `ends` shares."""
    n_path = BLOCK_TOKENS * len(path)
    if not ends:
        return Known(n_path, n_path, tuple(path), path[-1].checkpoints.get(BLOCK_TOKENS) if path else None)
    end, alike = max(ends, key=lambda one: one[1])
    return Known(n_path + alike, n_path + alike, (*path, end), end.checkpoints.get(alike))


def _own(part: Any) -> Any:
    """A copy in host memory, of its own size."""
    import torch

    return part.to("cpu", memory_format=torch.contiguous_format, copy=True)


def _n_alike(left: Sequence[int], right: Sequence[int]) -> int:
    for count, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return count
    return min(len(left), len(right))
