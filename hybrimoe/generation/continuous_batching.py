"""Continuous batching: replies join and leave at every token, and each is what it would be alone.

A step of the engine computes a part of the oldest prompt that is not complete, then one token of every other reply:
all of them in one compiled step where the model has one for all of it, else one after another. The compiled step gives
each sequence the bits that it has alone, and a prompt is cut into the same parts whoever else is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from cpu_kernels.step.program import MAX_LOGITS
from hybrimoe.amounts import parse_amount, size_text
from hybrimoe.errors import BudgetError, PromptError
from hybrimoe.generation.growing import LEAST_ROOM
from hybrimoe.generation.kv_cache import CacheRows, PrefixCache
from hybrimoe.generation.kv_memory import device_memory, kv_budget_bytes
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.sampling import UNLIMITED_TOKENS, SamplingOptions, reply_length

if TYPE_CHECKING:
    import torch

    from hybrimoe.generation.engine import TextGenerator
    from hybrimoe.generation.reply import Reply

__all__ = ["BatchEngine", "Progress", "default_parallel"]

MOST_PARALLEL = 4
"""Replies at once where nothing is said: each further one slows those that run, and takes memory from them."""
COMFORTABLE_TOKENS = 4096
"""Of prompt and reply together: the memory for keys and values should hold so many of each reply at once."""
PROMISED_TOKENS = 1024
"""Room that a reply without a length is sure of; beyond, it goes on while the others leave room."""
MOST_BROUGHT = 2
"""Times what it plans, that the memory which a reply takes over from an earlier one may be."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one reply. text: what may be shown now. ended: nothing more comes; error: because of it."""

    reply: Reply
    text: str = ""
    ended: bool = False
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class _Place:
    """A reply under way. planned: tokens of prompt and reply that it has room for; in_prompt: of which parts wait."""

    reply: Reply
    planned: int
    in_prompt: bool = True


class BatchEngine:
    """Up to `parallel` replies of one generator.

    prefixes: what any earlier prompt or reply computed, so that it is not computed again; None: nothing is kept beyond
    the latest replies. part_tokens: of a prompt, between two tokens of the others; None for the generator's own size.
    part_slower: see `prompts.parts.PromptPart`; part_us: what the others may wait for where a part is interrupted.
    One thread calls all methods.
    """

    def __init__(
        self, generator: TextGenerator, *, parallel: int = 1, prefixes: PrefixTree | None = None,
        part_tokens: int | None = None, part_slower: float = 0.0, part_us: float | None = None,
    ) -> None:  # fmt: skip
        self.generator = generator
        self.parallel = parallel
        self.prefixes = prefixes
        self.part_tokens, self.part_slower, self.part_us = part_tokens, part_slower, part_us
        self._rows = CacheRows(generator.model, parallel, prefixes)
        self._tell_step()
        self._places: list[_Place] = []
        self._held: dict[PrefixCache, int] = {}
        """Places without a reply, whose keys and values are saved or restored, and tokens for which each has room."""
        injection = getattr(generator.model, "hybrimoe", None)
        if injection is not None:
            injection.session.keep_keys(self)
        self.n_steps = 0
        """Steps so far that gave a token to each reply beyond its prompt."""

    @property
    def n_running(self) -> int:
        """Replies under way."""
        return len(self._places)

    @property
    def n_held(self) -> int:
        """Places in which no reply may begin until `release`."""
        return len(self._held)

    @property
    def places(self) -> dict[int, bool]:
        """The number of each place for a reply, and whether it is taken. Any thread may ask."""
        return self._rows.taken

    @property
    def kv_bytes(self) -> int:
        """Memory of keys and values: of replies under way as many bytes as their tokens take, of those that have ended
        what is still held of them. Any thread may ask."""
        under_way = [place.reply.cache for place in list(self._places)]
        n_running = sum(len(cache.token_ids) for cache in [*under_way, *list(self._held)])
        return self._rows.idle_bytes + n_running * self.generator.token_bytes()

    @property
    def in_turn(self) -> str | None:
        """Why the replies are computed one after another each token; None where one step computes all of them."""
        injection = getattr(self.generator.model, "hybrimoe", None)
        step = getattr(injection, "step", None)
        if self.generator.pace is not None:
            return "with speculation, a step has several tokens of one reply"
        if step is None:
            return getattr(getattr(injection, "way", None), "reason", None) or "the model has no compiled step"
        reason: str | None = step.one_by_one
        return reason

    def has_room(self, prompt_ids: Sequence[int], options: SamplingOptions) -> bool:
        """Whether a reply to the prompt could begin now: a place is free, and memory for its keys and values."""
        if len(self._places) + len(self._held) >= self.parallel:
            return False
        return not (self._places or self._held) or self._fits(self._planned(prompt_ids, options))

    def is_taken(self, number: int | None) -> bool:
        """Whether a reply that is to have this place must wait for it."""
        return number is not None and self.places.get(number, False)

    def admit(
        self, prompt_ids: Sequence[int], options: SamplingOptions, should_stop: Callable[[], bool],
        number: int | None = None,
    ) -> Reply:  # fmt: skip
        """A reply that the next steps compute; `has_room` has said that it may begin. Raises as `TextGenerator.reply`.

        should_stop: asked at every step; True ends the reply with what there is. number: of the place that it is to
        have, which is not taken; None: the one that has most of the prompt.
        """
        anew = options.prompt_logprobs is not None  # nothing is reused, so no conversation is taken for it
        cache, n_bytes = self._rows.take(() if anew else prompt_ids, number)
        try:
            reply = self.generator.reply(
                prompt_ids,
                options,
                cache=cache,
                should_stop=should_stop,
                part_tokens=self.part_tokens,
                part_slower=self.part_slower,
                part_us=self.part_us,
            )
        except Exception:
            self._rows.give_back(cache)
            raise
        self._places.append(_Place(reply, self._taken_over(cache, n_bytes, self._planned(prompt_ids, options))))
        self._free_idle_memory()
        reply.begin()
        return reply

    def hold(self, number: int, n_tokens: int | None = None) -> PrefixCache | None:
        """The cache of a place, which any thread may use until `release`; None where a reply is under way there.

        n_tokens: it forgets what it holds, and has room for so many. Raises PromptError where there is no such place,
        or no room.
        """
        taken = self.places
        if number not in taken:
            raise PromptError(f"there is no slot {number}: this server has {', '.join(map(str, taken))}")
        if taken[number]:
            return None
        if n_tokens is not None and not self._fits(n_tokens):
            raise PromptError(
                f"{n_tokens} tokens do not fit the memory for keys and values beside the replies under way: ask again"
                " later, or give more (memory.kv)"
            )
        cache, _ = self._rows.take((), number)
        if n_tokens is not None:
            cache.clear()
        self._held[cache] = len(cache.token_ids) if n_tokens is None else n_tokens
        self._free_idle_memory()
        return cache

    def release(self, cache: PrefixCache, *, is_new: bool = False) -> None:
        """The place is free again. is_new: what it holds was not computed here, and others may use it, too."""
        del self._held[cache]
        try:
            if is_new:
                cache.share_reply()
        finally:
            self._rows.give_back(cache)
            self._free_idle_memory()

    def step(self) -> Iterator[Progress]:
        """One part of a prompt, one token of each other reply; iterate it to the end. A failure ends its reply only."""
        yield from self._ended()
        decoding = [place for place in self._places if not place.in_prompt]
        prompt = next((place for place in self._places if place.in_prompt), None)
        if prompt is not None:
            yield from self._prefill(prompt)
        for place in decoding:
            self._extend_plan(place)
            if not place.reply.has_ended() and place.reply.must_shift():
                place.reply.begin_shift()
                place.in_prompt = True
        decoding = [place for place in decoding if not place.in_prompt]
        going = iter([place for place in decoding if not place.reply.has_ended()])
        self.n_steps += bool(decoding)
        while group := list(islice(going, MAX_LOGITS)):
            yield from self._decode(group)
        yield from self._ended()

    def resize_kv(self, budget: int | float | str) -> int:
        """Changes, between two steps, what the keys and values of all replies may take together.

        budget: a size ("4GiB"), a share of the device's memory, or auto, as `memory.kv`. Memory of replies that have
        ended is given back as far as that needs. Returns the bytes. Raises BudgetError, and nothing has changed, for
        less than the replies under way have room for, and for more than there is.
        """
        wanted = self.checked_kv(budget)
        self.set_kv(wanted)
        return wanted

    def checked_kv(self, budget: int | float | str) -> int:
        """Bytes that a budget for `resize_kv` stands for. Raises as that does."""
        wanted = kv_budget_bytes(self.generator.model, parse_amount(budget))
        least = self._planned_bytes
        if wanted < least:
            raise BudgetError(
                f"{size_text(wanted)} is less than what {self.n_running} replies under way have room for: give {least}B"
                f" ({size_text(least)}) or more, or wait until they have ended"
            )
        most = self.kv_bytes + device_memory(self.generator.model.device)[0]
        if wanted > max(most, self.generator.kv_bytes or 0):
            raise BudgetError(
                f"{size_text(wanted)} is more than {self.generator.model.device} has left: give {size_text(most)} or"
                " less, or take memory from experts first"
            )
        return wanted

    def set_kv(self, kv_bytes: int) -> None:
        """Keeps to so many bytes from here on, which `checked_kv` has given."""
        self.generator.kv_bytes = kv_bytes
        self._free_idle_memory()

    def resize_parallel(self, parallel: int) -> None:
        """Changes, between two steps, how many replies run at once; of parts of prompts the size stays.

        Raises BudgetError, and nothing has changed, for fewer than run now.
        """
        self.check_parallel(parallel)
        self._rows.resize(parallel - self.n_running - self.n_held)
        self.parallel = parallel
        self._tell_step()

    def check_parallel(self, parallel: int) -> None:
        """Raises as `resize_parallel` does."""
        n_taken = self.n_running + self.n_held
        if parallel < max(1, n_taken):
            raise BudgetError(
                f"{n_taken} replies are under way: give {max(1, n_taken)} or more, or wait until they"
                f" have ended; asked for {parallel}"
            )

    def _tell_step(self) -> None:
        """The compiled or captured step keeps something of each sequence."""
        step = getattr(getattr(self.generator.model, "hybrimoe", None), "step", None)
        if step is not None:
            step.keep_for(self.parallel)

    # One step ---------------------------------------------------------------------------------------------------

    def _ended(self) -> Iterator[Progress]:
        """Those leave that have their last token, or whose client has gone."""
        for place in list(self._places):
            if place.reply.has_ended():
                yield self._end(place)

    def _prefill(self, place: _Place) -> Iterator[Progress]:
        try:
            logits = place.reply.prefill()
        except Exception as error:  # noqa: BLE001  # it belongs to this reply; the others go on
            yield self._end(place, error)
            return
        if logits is None:
            return
        place.in_prompt = False
        taken = self._take(place, logits)
        yield taken
        if not taken.ended:
            yield from self._share_prompt(place)

    def _share_prompt(self, place: _Place) -> Iterator[Progress]:
        try:
            place.reply.share_prompt()
        except Exception as error:  # noqa: BLE001  # as above
            yield self._end(place, error)

    def _decode(self, places: list[_Place]) -> Iterator[Progress]:
        """One token of each."""
        rows = self._together(places)
        for number, place in enumerate(places):
            try:
                logits = place.reply.next_logits() if rows is None else rows[number]
            except Exception as error:  # noqa: BLE001  # as above
                yield self._end(place, error)
            else:
                yield self._take(place, logits)

    def _together(self, places: list[_Place]) -> torch.Tensor | None:
        """Logits [n, V] of one step; None where they must be computed in turn: always so, or because the step failed,
        so that each is computed again by itself and only those fail that cannot be."""
        if len(places) == 1 or self.in_turn is not None:
            return None
        tokens = [place.reply.token_ids[-1] for place in places]
        try:
            return self.generator.forward_each(tokens, [place.reply.cache for place in places])
        except Exception:  # noqa: BLE001  # the one that it belongs to fails again by itself
            return None

    def _take(self, place: _Place, logits: torch.Tensor) -> Progress:
        try:
            return Progress(place.reply, place.reply.take(logits))
        except Exception as error:  # noqa: BLE001  # as above
            return self._end(place, error)

    def _end(self, place: _Place, error: Exception | None = None) -> Progress:
        """The reply leaves the batch."""
        self._places.remove(place)
        try:
            text = place.reply.end() if error is None else ""
        except Exception as failed:  # noqa: BLE001  # as above
            return Progress(place.reply, ended=True, error=failed)
        finally:
            self._rows.give_back(place.reply.cache)
            self._free_idle_memory()
        return Progress(place.reply, text, ended=True, error=error)

    # Memory -----------------------------------------------------------------------------------------------------

    def _planned(self, prompt_ids: Sequence[int], options: SamplingOptions) -> int:
        """Tokens of prompt and reply that must fit before the reply begins."""
        length = reply_length(self.generator.model, options, len(prompt_ids))
        wanted = max(LEAST_ROOM, len(prompt_ids) + (PROMISED_TOKENS if length == UNLIMITED_TOKENS else length))
        limit = self.generator.context_tokens
        return wanted if limit is None else min(wanted, limit)

    @property
    def _planned_bytes(self) -> int:
        """What the replies under way have room for."""
        return self._planned_tokens * self.generator.token_bytes()

    @property
    def _planned_tokens(self) -> int:
        return sum(place.planned for place in self._places) + sum(self._held.values())

    def _fits(self, n_more: int) -> bool:
        """Whether the memory holds so many tokens beside what the replies under way have planned."""
        limit = self.generator.memory_tokens
        return limit is None or self._planned_tokens + n_more <= limit

    def _extend_plan(self, place: _Place) -> None:
        """Before a token is added: a reply beyond its plan takes room that is free, and ends where there is none."""
        needed = place.reply.n_context + 1
        if needed <= place.planned or place.reply.has_ended():
            return
        limit = self.generator.context_tokens
        wanted = place.planned + LEAST_ROOM if limit is None else min(place.planned + LEAST_ROOM, limit)
        if self._fits(wanted - place.planned):
            place.planned = wanted
            self._free_idle_memory()
        else:
            place.reply.finish("context")

    def _taken_over(self, cache: PrefixCache, n_bytes: int, planned: int) -> int:
        """Tokens that a reply has room for which plans some and takes over the memory of an earlier one, n_bytes.

        Memory that is far more than it needs, and more than its share of what there is for all, is freed. Else it
        stays: a long conversation that comes back would wait for new memory longer than for what is copied into it.
        """
        brought, memory = n_bytes // max(1, self.generator.token_bytes()), self.generator.memory_tokens
        is_much = brought > MOST_BROUGHT * planned and memory is not None and brought > memory // self.parallel
        if is_much or not self._fits(brought):
            cache.clear()
            return planned
        return max(planned, brought)

    def _free_idle_memory(self) -> None:
        """Caches of replies that have ended leave the room that those under way have planned."""
        if self.generator.kv_bytes is not None:
            self._rows.shrink(self.generator.kv_bytes - self._planned_bytes)


def default_parallel(generator: TextGenerator) -> int:
    """Replies at once for which the memory for keys and values has comfortable room, at most MOST_PARALLEL."""
    memory = generator.memory_tokens
    if memory is None:
        return MOST_PARALLEL
    each = min(generator.context_tokens or COMFORTABLE_TOKENS, COMFORTABLE_TOKENS)
    return max(1, min(MOST_PARALLEL, memory // each))
