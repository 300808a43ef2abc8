"""Where the time of a reply went: parts of the model, planning, experts by lane, sampling, text, and the rest.

Every moment between the beginning and the end of a reply is charged to exactly one part, so the parts of a phase add up
to its duration. Three sources say whose a moment is: hooks on the modules where transformers' forward runs, the clock
ticks of the compiled or captured step where that runs, and the session's counters for what happens inside a call of
experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from hybrimoe.generation.module_parts import module_parts, timed_modules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hybrimoe.runtime.layer_call.stats import Counters

__all__ = ["PARTS", "PhaseProfile", "Profile", "ProfiledPhase"]

PARTS = (
    "norms", "projections", "attention", "router", "pieces", "planning", "experts_cpu", "experts_disk",
    "experts_accelerator", "experts_link", "shared_experts", "output_layer", "sampling", "detokenising", "caller",
    "framework",
)  # fmt: skip
"""In the order in which they are shown.

pieces: the captured pieces of a step on a card, norms to router in one, as the host sees them: launching, and waiting
for what is read from the card. planning: everything in calls of experts but the lanes. experts_cpu: the CPU lane.
experts_disk: the CPU lane waiting for experts that are read from disk.
experts_accelerator: waiting for the accelerator while it computes. experts_link: waiting for it while a transfer keeps
it from computing. caller: whoever takes the text (a terminal, a server).
framework: all the rest, transformers' and ours.
"""
ProfiledPhase = Literal["prefill", "decode"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(slots=True)
class PhaseProfile:
    """One phase of one reply: its tokens (computed ones of the prompt, or tokens after the first), duration, parts."""

    n_tokens: int = 0
    us: float = 0.0
    parts_us: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"tokens": self.n_tokens, "us": self.us, "parts_us": dict(self.parts_us)}


class Stopwatch:
    """Charges time to the part on top of a stack, so that each moment counts once and nested parts are not counted
    twice."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns
        self._stack = ["framework"]
        self._ns: dict[str, int] = {}
        self._last = clock_ns()

    def begin(self, part: str) -> None:
        """From here on time is `part`'s, until the `end` that belongs to this."""
        self._charge()
        self._stack.append(part)

    def end(self) -> None:
        """From here on time is again the part's that was before."""
        self._charge()
        self._stack.pop()

    def take_us(self) -> dict[str, float]:
        """Time of each part since the last take."""
        self._charge()
        taken, self._ns = self._ns, {}
        return {part: ns / 1000 for part, ns in taken.items()}

    def _charge(self) -> None:
        now, part = self._clock_ns(), self._stack[-1]
        self._ns[part] = self._ns.get(part, 0) + now - self._last
        self._last = now


class Profile:
    """Give a new one to `TextGenerator.reply`; `phases` has the figures once the reply has ended.

    Times are those of the host. On a card, whose work goes on behind the host, a part's time is what the host took to
    launch it, and the waiting shows where the host waits.
    """

    def __init__(self, model: Any) -> None:
        self.phases: dict[ProfiledPhase, PhaseProfile] = {"prefill": PhaseProfile(), "decode": PhaseProfile()}
        injection = getattr(model, "hybrimoe", None)
        self._model = model
        self._modules = module_parts(model)
        self._session: Any = getattr(injection, "session", None)
        self._step: Any = getattr(injection, "step", None)
        self._watch = Stopwatch()
        self._phase: ProfiledPhase = "prefill"
        self._stepped: dict[str, float] = {}
        self._counted: Mapping[str, Counters] = {}

    def watch(self, pieces: Iterator[str]) -> Iterator[str]:
        """`pieces`, with the time that each takes to come, and that the caller takes with it, charged to its parts."""
        with timed_modules(self._model, self._modules, self._watch.begin, self._watch.end):
            self._counted = self._counters()
            self._watch.take_us()
            try:
                for piece in pieces:
                    self._watch.begin("caller")
                    try:
                        yield piece
                    finally:
                        self._watch.end()
            finally:
                self._end_phase()

    def timed(self, part: str, work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """`work`, charged to `part`."""

        def worked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            self._watch.begin(part)
            try:
                return work(*args, **kwargs)
            finally:
                self._watch.end()

        return worked

    def forwarding(self, forward: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """`forward`, with what the compiled or captured step did in it charged to the step's parts."""
        if self._step is None:
            return forward

        def stepped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            before, before_us = self._step.meter()
            try:
                return forward(*args, **kwargs)
            finally:
                ticks, us = self._step.meter()
                us_per_tick = (us - before_us) / max(1, sum(ticks.values()) - sum(before.values()))
                for part, count in ticks.items():
                    self._stepped[part] = self._stepped.get(part, 0.0) + (count - before[part]) * us_per_tick

        return stepped

    def choosing(
        self, choose: Callable[Arguments, Result], n_prefilled: Callable[[], int]
    ) -> Callable[Arguments, Result]:
        """`choose`, charged to sampling; the first token that it chooses ends the prefill, of so many tokens."""
        timed = self.timed("sampling", choose)

        def chosen(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            token = timed(*args, **kwargs)
            if self._phase == "prefill":
                self.phases["prefill"].n_tokens = n_prefilled()
                self._end_phase()
                self._phase = "decode"
            else:
                self.phases["decode"].n_tokens += 1
            return token

        return chosen

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, by phase."""
        return {phase: profile.as_dict() for phase, profile in self.phases.items()}

    def _end_phase(self) -> None:
        """Charges what was timed since the last call to the phase that runs."""
        before, self._counted = self._counted, self._counters()
        phase, taken = self.phases[self._phase], self._watch.take_us()
        phase.us += sum(taken.values())
        stepped, self._stepped = self._stepped, {}
        experts_us = taken.pop("experts", 0.0)
        taken["framework"] = taken.get("framework", 0.0) - sum(stepped.values())
        lanes = split_experts(experts_us, stepped.get("experts", 0.0), before, self._counted)
        stepped["experts_cpu"] = stepped.pop("experts", 0.0)
        for part, us in (*taken.items(), *stepped.items(), *lanes.items()):
            phase.parts_us[part] += us

    def _counters(self) -> Mapping[str, Counters]:
        return {} if self._session is None else self._session.stats().layers


def split_experts(
    experts_us: float, stepped_us: float, before: Mapping[str, Counters], after: Mapping[str, Counters]
) -> dict[str, float]:
    """Time in calls of experts by what it was for: planning, experts_cpu, experts_disk, experts_accelerator,
    experts_link.

    experts_us: of the modules' calls. stepped_us: experts of compiled steps, which the counters have as well. before,
    after: counters by layer. Of the time that a layer waited after its CPU lane, the link has what the accelerator did
    not compute in: from the call's beginning on it worked, or waited for bytes.
    """
    if not after:  # a model as transformers has it
        return {"experts_cpu": experts_us}
    cpu_us, disk_us, accel_us, link_us = -stepped_us, 0.0, 0.0, 0.0
    for path, now in after.items():
        layer = now.since(before[path])
        cpu_us += layer.cpu_us
        disk_us += layer.disk_wait_us
        if layer.accel_experts:
            on_host_us = layer.cpu_us + layer.disk_wait_us
            waited = max(0.0, layer.wall_us - layer.overhead_us - on_host_us)
            idle = on_host_us + waited - layer.accel_us
            link = min(max(0.0, idle), waited, layer.link_us)
            link_us += link
            accel_us += waited - link
    left, lanes = experts_us, {}
    parts = {"cpu": cpu_us, "disk": disk_us, "accelerator": accel_us, "link": link_us}
    for part, us in ((f"experts_{lane}", us) for lane, us in parts.items()):
        lanes[part] = min(max(0.0, us), left)
        left -= lanes[part]
    return {**lanes, "planning": left}
