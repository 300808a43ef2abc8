"""What of a model a machine has room for, chosen whole: behind `--fit`. No weights are read.

Dtypes first: the most precise weights with which all experts fit host memory. Then the memory for keys and values:
what the experts leave, for as many replies as are wanted and for a context as long as that allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hybrimoe.errors import BudgetError
from hybrimoe.tracing.study.planning import DEFAULT_CONTEXT, GIB, HOST_RESERVE_BYTES, Fit, fit, token_bytes
from scheduler.machine.profile import HardwareProfile, ModelShape

__all__ = ["CANDIDATES", "Choice", "Machine", "Wish", "choose", "choose_stored"]

CANDIDATES = (("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "int8"))
"""Dtypes of experts and of all other weights, the most precise first; int4 dense layers are for who asks for them."""
MIB = 1 << 20
KV_DTYPE = "bfloat16"
"""Of keys and values: as the model computes them."""
SPARE_SHARE = 0.5
"""Of what experts leave free, for keys and values; the rest is for a server's prefix cache, prompts under way, and
other programs."""
DEVICE_SHARE = 0.125
"""Of a device that has no room for all experts, what keys and values may take of theirs: slots serve every token."""
ROUND_TOKENS = 256
"""Contexts are whole multiples of it, as caches grow."""
COMFORTABLE_TOKENS = 4096
"""Of each reply, before there is another one beside it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the model is to run. device_bytes: of each accelerator, None for the profile's; host_bytes: free ones."""

    profile: HardwareProfile
    device_bytes: int | None
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What is settled already; None is to be chosen.

    context: tokens of each reply, its prompt included. replies: at once, else at most `most_replies`. kv_bytes: memory
    for keys and values, with the room in which they grow. kv_dtype: how they are stored, for which the shape's
    `kv_bytes` are.
    """

    context: int | None = None
    replies: int | None = None
    most_replies: int = 1
    expert_dtype: str | None = None
    dense_dtype: str | None = None
    kv_bytes: int | None = None
    kv_dtype: str = KV_DTYPE

    def candidates(self) -> list[tuple[str, str]]:
        """Dtypes of experts and of all other weights, the most precise first."""
        found = [(self.expert_dtype or expert, self.dense_dtype or dense) for expert, dense in CANDIDATES]
        return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, what of the model fits with it, and why. kv_bytes: for keys and values, with the room in which
    they grow; replies and context are in `fit`."""

    expert_dtype: str
    dense_dtype: str
    kv_bytes: int
    fit: Fit
    reasons: tuple[str, ...]
    kv_dtype: str = KV_DTYPE

    @property
    def needs_disk(self) -> bool:
        """Whether experts stay on disk, because none of the candidates fits host memory."""
        return self.fit.disk_experts > 0


def choose(shape: ModelShape, machine: Machine, wish: Wish) -> Choice:
    """The first candidate with room for all experts in host memory; else the last one that runs at all, with disk.

    Raises BudgetError, which names the nearest that fits, where nothing does; ConfigError for a context beyond the
    model's.
    """
    reasons: list[str] = []
    best: tuple[str, str, Fit] | None = None
    for expert_dtype, dense_dtype in wish.candidates():
        what = f"{expert_dtype} experts with {dense_dtype} dense weights"
        try:
            found = _fit(shape, machine, expert_dtype, dense_dtype, _least(shape, wish), wish.replies or 1)
        except BudgetError as error:
            reasons.append(f"{what}: {error}")
            continue
        best = expert_dtype, dense_dtype, found
        if not found.disk_experts:
            reasons.append(_all_fit(what, found))
            break
        reasons.append(
            f"{what}: {found.disk_experts} of {found.n_experts} experts"
            f" ({_gib(found.disk_experts * found.expert_bytes)}) do not fit host memory"
        )
    if best is None:
        raise BudgetError(f"{shape.name}: nothing fits. {'. '.join(reasons)}. {_nearest(shape, machine, wish)}")
    expert_dtype, dense_dtype, found = best
    if found.disk_experts:
        reasons.append("what does not fit host memory is read from disk when it is needed (memory.disk: auto)")
    found, kv_bytes = _with_room(shape, machine, wish, best)
    reasons += [_cache_reason(shape, found, kv_bytes, wish.kv_dtype), _slots_reason(found)]
    return Choice(expert_dtype, dense_dtype, kv_bytes, found, tuple(reasons), wish.kv_dtype)


def choose_stored(shapes: Mapping[str, ModelShape], machine: Machine, wish: Wish) -> Choice:
    """`choose` with keys and values in the first dtype for which anything fits.

    shapes: of the model, by that dtype, the preferred one first. Those in fewer bits come only where nothing fits else:
    they are an approximation, and need attention that is compiled on the CPU.

    Raises as `choose` for the first one.
    """
    failed: dict[str, BudgetError] = {}
    for kv_dtype, shape in shapes.items():
        try:
            choice = choose(shape, machine, replace(wish, kv_dtype=kv_dtype))
        except BudgetError as error:
            failed[kv_dtype] = error
            continue
        if not failed:
            return choice
        why = f"with keys and values in {' or '.join(failed)} nothing fits; {kv_dtype} is an approximation (docs/kv.md)"
        return replace(choice, reasons=(*choice.reasons, why))
    raise next(iter(failed.values()))


def _fit(
    shape: ModelShape, machine: Machine, expert_dtype: str, dense_dtype: str, context: int | None, replies: int
) -> Fit:
    return fit(
        shape, machine.profile, context=context, expert_dtype=expert_dtype, dense_dtype=dense_dtype,
        device_bytes=machine.device_bytes, host_bytes=machine.host_bytes, replies=replies,
    )  # fmt: skip


def _least(shape: ModelShape, wish: Wish) -> int | None:
    """Tokens of a reply for which there must be room in any case; None is what is usual."""
    if wish.context is not None or wish.kv_bytes is None:
        return wish.context
    held = wish.kv_bytes // _growing_bytes(shape) // (wish.replies or 1)
    return min(max(1, held), shape.max_context or DEFAULT_CONTEXT)


def _with_room(shape: ModelShape, machine: Machine, wish: Wish, best: tuple[str, str, Fit]) -> tuple[Fit, int]:
    """The fit with as many replies and as long a context as the memory for keys and values allows, and that memory."""
    expert_dtype, dense_dtype, found = best
    each = _growing_bytes(shape)
    if not each:
        return found, 0
    room = _kv_room(found) if wish.kv_bytes is None else wish.kv_bytes
    tokens = room // each
    limit = shape.max_context or tokens
    comfortable = min(limit, wish.context or COMFORTABLE_TOKENS)
    replies = wish.replies or max(1, min(wish.most_replies, tokens // comfortable))
    context = wish.context or min(limit, _rounded(tokens // replies))
    if context * replies < found.context * found.replies:
        context, replies = found.context, found.replies
    final = _fit(shape, machine, expert_dtype, dense_dtype, context, replies)
    return final, wish.kv_bytes or context * replies * each


def _kv_room(found: Fit) -> int:
    """Bytes that keys and values may take where nobody says how many, at least those that are planned."""
    device, kept_free = found.device_bytes, found.kept_free_bytes
    beside = (device - kept_free if device else found.host_bytes - HOST_RESERVE_BYTES) - found.dense_bytes
    spare = beside - found.n_experts * found.expert_bytes
    if spare > 0:
        return max(found.kv_bytes, int(SPARE_SHARE * spare))
    return max(found.kv_bytes, int(DEVICE_SHARE * beside) if device else 0)


def _growing_bytes(shape: ModelShape) -> int:
    """Memory of a token's keys and values, with the room in which a cache grows."""
    from hybrimoe.generation.growing import ROOM_SHARE

    n_bytes = token_bytes(shape)
    return n_bytes + n_bytes // ROOM_SHARE


def _rounded(tokens: int) -> int:
    return tokens - tokens % ROUND_TOKENS if tokens > ROUND_TOKENS else max(1, tokens)


# What is said -------------------------------------------------------------------------------------------------------


def _all_fit(what: str, found: Fit) -> str:
    experts = f"all {found.n_experts} experts ({_gib(found.n_experts * found.expert_bytes)})"
    where = f"the {_gib(found.host_bytes)} of host memory"
    dense = f"{_gib(found.dense_bytes)} of dense weights"
    return f"{what}: {experts} fit {where}, beside " + (f"{dense} on the device" if found.device_bytes else dense)


def _cache_reason(shape: ModelShape, found: Fit, kv_bytes: int, kv_dtype: str) -> str:
    each = "one reply" if found.replies == 1 else f"{found.replies} replies at once, each"
    limit = f"; the model's own limit is {shape.max_context}" if found.context == shape.max_context else ""
    return (
        f"keys and values in {kv_dtype}: {token_bytes(shape) / 2**10:.0f} KiB a token; {_gib(kv_bytes)} hold {each} of"
        f" {found.context} tokens, prompt included{limit}"
    )


def _slots_reason(found: Fit) -> str:
    in_host = f"{found.host_experts} of {found.n_experts} experts in host memory"
    if not found.device_bytes:
        return f"no accelerator: {in_host}, and no slots"
    share = found.device_experts / found.n_experts
    return (
        f"about {found.device_experts} slots ({share:.0%} of the experts) in the {_gib(found.device_bytes)} of the"
        f" device beside dense weights, keys and values; {in_host}"
    )


def _nearest(shape: ModelShape, machine: Machine, wish: Wish) -> str:
    """What fits instead: a shorter context of one reply, smaller weights, or what memory the smallest needs."""
    for what, wanted in _nearer(wish):
        for expert_dtype, dense_dtype in wanted.candidates():
            try:
                found = _fit(shape, machine, expert_dtype, dense_dtype, 1, 1)
            except BudgetError:
                continue
            context = _rounded(min(found.max_context, wish.context or found.max_context))
            if context:
                return (
                    f"The nearest that fits{what}: {expert_dtype} experts with {dense_dtype} dense weights, one reply"
                    f" of {context} tokens"
                )
    expert_dtype, dense_dtype = CANDIDATES[-1]
    roomy = Machine(machine.profile, 0, 1 << 60)
    least = _fit(shape, roomy, expert_dtype, dense_dtype, 1, 1)
    needed = least.dense_bytes + least.n_experts * least.expert_bytes + least.kv_bytes + HOST_RESERVE_BYTES
    return (
        f"The smallest form, {expert_dtype} experts with {dense_dtype} dense weights, needs {_gib(needed)} of host"
        f" memory, {_gib(HOST_RESERVE_BYTES)} of them for everything else that runs"
    )


def _nearer(wish: Wish) -> Iterator[tuple[str, Wish]]:
    yield "", wish
    if wish.expert_dtype is not None or wish.dense_dtype is not None:
        yield " with other dtypes", Wish(wish.context)


def _gib(n_bytes: int) -> str:
    """An amount in GiB, in MiB where that would be next to none."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB // 10 else f"{n_bytes / MIB:.1f} MiB"
