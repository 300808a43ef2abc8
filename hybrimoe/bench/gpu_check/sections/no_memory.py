"""The device's memory taken by somebody else, then a prompt: it is computed with fewer slots, or refused clearly."""

from __future__ import annotations

import math
import warnings

import torch

from gpu_kernels.devices import memory_info
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.sections import models
from hybrimoe.bench.gpu_check.setting import Setting
from hybrimoe.errors import HybriMoEError
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.sampling import MAX_TOP_LOGPROBS, TokenLogprob

LEFT_FREE_BYTES = 8 << 20
SHARE = 0.5
ONE_TOKEN = SamplingOptions(temperature=0.0, max_new_tokens=1, ignore_eos=True, top_logprobs=MAX_TOP_LOGPROBS)
LARGEST_DIFFERENCE = 0.05
"""Of a token's log probability (natural log), between two computations of one prompt."""


def run(setting: Setting, findings: Findings) -> None:
    """A reply to a long prompt before, while and after the memory is taken."""
    if setting.emulated:
        raise SkippedError("the emulated device has no memory of its own")
    ids = models.prompt(setting, setting.long_prompt_tokens)
    with models.opened(setting, setting.accelerator, "int4", policy="static", share=SHARE) as generator:
        session = generator.model.hybrimoe.session
        device = session.accelerators[0].device
        wanted = _replied(generator, ids)
        slots = session.n_slots
        taken = _take(device)
        free_bytes, _ = memory_info(device)
        told, found = _reply(generator, ids)
        difference = None if found is None else _difference(found, wanted)
        findings.row(
            "a prompt while the memory is taken", taken_mib=sum(piece.numel() for piece in taken) >> 20,
            free_mib=free_bytes >> 20, told=told, slots_before=slots, slots_after=session.n_slots,
            largest_difference=difference,
        )  # fmt: skip
        if difference is not None:
            findings.require(difference <= LARGEST_DIFFERENCE, "the reply went on with wrong numbers")
        taken.clear()
        _give_back(device)
        after = _difference(_replied(generator, ids), wanted)
        findings.row("the same prompt afterwards", slots=session.n_slots, largest_difference=after)
        findings.require(after <= LARGEST_DIFFERENCE, f"afterwards log probabilities differ by {after}")


def _take(device: torch.device) -> list[torch.Tensor]:
    """Nearly all memory of the device that is free: by pieces, until no more is given."""
    _give_back(device)
    taken: list[torch.Tensor] = []
    size = memory_info(device)[0] - LEFT_FREE_BYTES
    while size > LEFT_FREE_BYTES:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
        else:
            size = min(size, memory_info(device)[0] - LEFT_FREE_BYTES)
    return taken


def _give_back(device: torch.device) -> None:
    """Blocks that torch keeps without using them."""
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def _reply(generator: TextGenerator, ids: list[int]) -> tuple[str, TokenLogprob | None]:
    """What was told, and the first token or None. Any error but a clear one of ours goes through."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = _replied(generator, ids)
        except HybriMoEError as error:
            return f"{type(error).__name__}: {error}"[:400], None
    told = "; ".join(sorted({str(item.message) for item in warned}))
    return told or "nothing: there was room", found


def _replied(generator: TextGenerator, ids: list[int]) -> TokenLogprob:
    """The first token of a greedy reply, with the most likely ones."""
    reply = generator.reply(ids, ONE_TOKEN)
    for _ in reply:
        pass
    return reply.logprobs[0]


def _difference(found: TokenLogprob, wanted: TokenLogprob) -> float:
    """The largest one between the log probabilities of the tokens that are among the most likely in both.

    Infinite where these are fewer than half.
    """
    ours, theirs = dict(found.top), dict(wanted.top)
    both = ours.keys() & theirs.keys()
    if 2 * len(both) < len(theirs):
        return math.inf
    return round(max(abs(ours[token] - theirs[token]) for token in both), 4)
