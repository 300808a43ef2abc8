"""The measurement behind `hybrimoe bench overhead`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from cpu_kernels import ExpertWeights, reference_ffn, relative_error, tolerance
from cpu_kernels.engine import layer as kernel_driver
from cpu_kernels.engine import routed
from gpu_kernels import Accelerator, EmulatedAccelerator, TorchAccelerator
from gpu_kernels.graphs import Graph
from gpu_kernels.streams import HostEvent
from hybrimoe.bench.host_driver import HostDriver, HostPiece
from hybrimoe.bench.rounds import busy_warning, spread
from hybrimoe.bench.stopwatch import Stopwatch, Timed, Times
from hybrimoe.errors import ModelError
from hybrimoe.machine.facts import machine
from hybrimoe.machine.interpreter import gather_on_huge_pages
from hybrimoe.machine.profiles import open_hardware
from hybrimoe.runtime import HybridExperts, RuntimeConfig, Session
from hybrimoe.runtime.layer_call.lookahead import Lookahead
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.token_loop.loop import TokenLoop
from scheduler import HardwareProfile, ModelShape, Planner
from yaml_rules.shapes import load_shape

SEED = 0
WEIGHT_SCALE = 0.02
GATE_SCALE = 2.0
"""Standard deviation of the router's logits."""
DRIFT = 0.3
"""Step of the random walk of hidden states: neighbouring tokens share about half of their experts."""
WARM_STEPS = 20

TIMED = (
    Timed("bookkeeping", HybridExperts, "forward"),
    Timed("kernels", kernel_driver, "run_layer"),
    Timed("kernels", routed, "run_routed"),
    Timed("waiting", HostEvent, "wait"),
    Timed("prediction", Lookahead, "predict"),
    Timed("planning", Planner, "decide"),
    Timed("planning", Planner, "end_transfer"),
    Timed("planning", Planner, "end_layer"),
    Timed("planning", Planner, "observe"),
    Timed("dispatch", EmulatedAccelerator, "run_experts"),
    Timed("dispatch", EmulatedAccelerator, "copy_to_slot"),
)
"""What is timed; the rest of a call is bookkeeping: tensors, grouping by expert, counters, the sum of the rows."""
BESIDE = ("kernels", "waiting", "link")
"""Sections in which experts of the layer are computed, waited for or copied (what stands for a card copies in the
calling thread, which a card's link does by itself). The CPU time of all others is the overhead."""
CARD = "h100"
"""The hardware profile by whose costs a call that a card has sent is planned."""
NOTHING = Times()
LOOPED = ("ours",)
"""Policies whose tokens are one compiled loop."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is measured."""

    shape: str
    layers: int
    policies: tuple[str, ...]
    dtype: str
    slots: float
    steps: int
    rounds: int


class Router(nn.Module):
    """A linear gate in the common form, so that lookahead has something to apply."""

    def __init__(self, hidden: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_experts, hidden) * GATE_SCALE / hidden**0.5)


class Experts(nn.Module):
    """Experts in the common form, on the meta device."""

    def __init__(self, n_experts: int, hidden: int, inter: int) -> None:
        super().__init__()
        self.num_experts = n_experts
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * inter, hidden, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden, inter, device="meta"))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: torch.Tensor = self.act_fn(gate) * up
        return result

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Never computed here: the session's layers take its place."""
        raise ModelError("these experts have no weights")


@dataclass(frozen=True, slots=True)
class HostGraph:
    """Recorded work of a device that is not there."""

    replay: Callable[[], None]


NOT_LAUNCHED = HostGraph(lambda: None)
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Contender:
    """One session over random weights. `policy` None: no accelerator."""

    name, lanes = "emulated accelerator, {}", "measured (accelerator emulated)"
    timed: tuple[Timed, ...] = TIMED

    def __init__(self, request: Request, policy: str | None) -> None:
        shape = ModelShape.from_mapping(load_shape(request.shape))
        self.top_k, self.hidden = shape.top_k, shape.hidden
        torch.manual_seed(SEED)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        accelerator = None if policy is None else self._accelerator()
        config = RuntimeConfig(
            "none", request.slots, request.dtype, policy=policy or "ours",  # type: ignore[arg-type]
            threads=1 if policy else None, profile=self._profile(),
        )  # fmt: skip
        self.session = Session(config)
        self.experts: list[HybridExperts] = []
        for index in range(request.layers):
            block = nn.Module()
            block.gate = Router(shape.hidden, shape.n_experts)
            module = Experts(shape.n_experts, shape.hidden, shape.inter)
            block.experts = self.session.add_layer(f"layers.{index}.experts", module)
            self.model.layers.append(block)
            self.experts.append(block.experts)
        self.session.finalize(self.model, accelerator=accelerator)
        self._fill_store(shape.n_experts, shape.hidden, shape.inter)
        self.session.start()
        gather_on_huge_pages()  # as the session does some seconds after its start: measured is what comes then

    @staticmethod
    def _accelerator() -> Accelerator:
        return EmulatedAccelerator()

    @staticmethod
    def _profile() -> HardwareProfile | None:
        """The costs that plans are made by; None: measured."""
        return None

    def _fill_store(self, n_experts: int, hidden: int, inter: int) -> None:
        """One random expert a layer, stored for each: values do not matter, bytes do."""
        for layer in range(len(self.experts)):
            weights = ExpertWeights(
                up=torch.randn(inter, hidden) * WEIGHT_SCALE,
                down=torch.randn(hidden, inter) * WEIGHT_SCALE,
                gate=torch.randn(inter, hidden) * WEIGHT_SCALE,
            )
            self.session.store.write(layer, 0, weights)
            for expert in range(1, n_experts):
                self.session.store.record(layer, expert)[:] = self.session.store.record(layer, 0)

    def calls(self, n_steps: int) -> list[list[Call]]:
        """Decode steps: a random walk of hidden states, routed by each layer's gate."""
        generator = torch.Generator().manual_seed(SEED)
        hidden = torch.randn(1, self.hidden, generator=generator)
        steps = []
        for _ in range(n_steps):
            hidden = hidden + DRIFT * torch.randn(hidden.shape, generator=generator)
            hidden = hidden / hidden.std()
            steps.append([self._routed(layer, hidden) for layer in range(len(self.experts))])
        return steps

    def _routed(self, layer: int, hidden: torch.Tensor) -> Call:
        with torch.no_grad():
            gate = self.model.layers[layer].gate  # type: ignore[union-attr, index]
            weights, index = torch.softmax(hidden @ gate.weight.T, -1).topk(self.top_k)
        return hidden, index, weights

    def run(self, steps: list[list[Call]]) -> float:
        """All layers of all steps. Returns the us of the calls, without what makes their tensors."""
        took_ns = 0
        with torch.no_grad():
            for step in steps:
                for layer, call in enumerate(step):
                    run = self.prepared(layer, call)
                    took_ns -= time.perf_counter_ns()
                    run()
                    took_ns += time.perf_counter_ns()
        return took_ns * 1e-3

    def prepared(self, layer: int, call: Call) -> Callable[[], object]:
        """What runs a call of a layer, and nothing else: with tensors that were just made, as a model's router does."""
        return partial(self.experts[layer], *[tensor.clone() for tensor in call])

    def check(self) -> None:
        """Raises ModelError where the output of a call is not that of the reference."""
        spec = self.session.layer_specs()[0].spec
        call = hidden, index, weights = self.calls(1)[0][0]
        expected = sum(
            weight * reference_ffn(spec, self.session.store.read(0, expert), hidden)
            for expert, weight in zip(index[0].tolist(), weights[0].tolist(), strict=True)
        )
        with torch.no_grad():
            error = relative_error(self._output(call), torch.as_tensor(expected))
        if error > tolerance(spec):
            raise ModelError(f"refusing to measure: outputs differ from the reference by {error:.2g}")

    def _output(self, call: Call) -> torch.Tensor:
        """Of a call of the first layer."""
        output: torch.Tensor = self.experts[0](*call)
        return output


class SentContender(Contender):
    """Calls as the captured steps of a card send them, to see what they cost the host. There is no card: the CPU's
    memory stands for its own, and its work is left out."""

    name, lanes = "sent by a card, {}", "measured (the card's own work left out)"

    def __init__(self, request: Request, policy: str) -> None:
        super().__init__(request, policy)
        exchanged = self.session.exchanged()
        assert exchanged is not None
        call = self.calls(1)[0][0]
        self._exchange, self._exchanged = exchanged.send(*call), exchanged
        self._sent = [self._recorded(layer, call, NOT_LAUNCHED) for layer in range(request.layers)]

    @staticmethod
    def _accelerator() -> Accelerator:
        return TorchAccelerator("cpu", fused=False)

    @staticmethod
    def _profile() -> HardwareProfile | None:
        return open_hardware(CARD)

    def _recorded(self, layer: int, call: Call, graph: Graph) -> SentCall:
        return self._exchanged.sent_call(layer, self._exchange, *call, graph)

    def prepared(self, layer: int, call: Call) -> Callable[[], object]:
        """What runs a call of a layer once the card has sent it."""
        self._exchange.send(*call)
        return partial(self.answer, layer)

    def answer(self, layer: int) -> None:
        """A call of a layer, and what it leaves to do once the card goes on."""
        self.session.run_sent(self._sent[layer])
        self.session.settle()

    def _output(self, call: Call) -> torch.Tensor:
        hidden, _, weights = call
        self._exchange.send(*call)
        compute = partial(self._exchanged.compute, 0, self._exchange, hidden, weights)
        self.session.run_sent(self._recorded(0, call, HostGraph(compute)))
        return self._exchanged.combine(self._exchange, hidden)


class LoopContender(SentContender):
    """The same calls as a token's compiled loop answers them: pieces bring the tensors, and everything else that a card
    would do is left out."""

    name = "a token without Python, {}"

    def __init__(self, request: Request, policy: str) -> None:
        super().__init__(request, policy)
        held = self._exchange.hidden, self._exchange.ids, self._exchange.weights
        self._brought = [[torch.zeros_like(tensor) for tensor in held] for _ in self._sent]
        pieces = [*(HostPiece(held, brought) for brought in self._brought), HostPiece()]
        calls = [self._recorded(call.layer, (call.hidden, call.ids, call.weights), HostPiece()) for call in self._sent]
        runner = self._sent[0].runner
        self.loop = TokenLoop(runner, self._sent[0].accelerator, HostDriver(), pieces, calls)

    def run(self, steps: list[list[Call]]) -> float:
        """All layers of all steps. Returns the us of the steps."""
        return sum(self.us_of_step(step) for step in steps)

    def bring(self, layer: int, call: Call) -> None:
        """The piece before a layer sends these tensors, whenever it is launched."""
        for place, tensor in zip(self._brought[layer], call, strict=True):
            place.copy_(tensor)

    def us_of_step(self, step: list[Call]) -> float:
        """One step, by the loop, or layer by layer where that cannot begin yet."""
        for layer, call in enumerate(step):
            self.bring(layer, call)
        self.session.announce_step("decode")
        start_ns = time.perf_counter_ns()
        stop = self.session.run_token(self.loop, 0, launched=False)
        took_us = (time.perf_counter_ns() - start_ns) * 1e-3
        if stop is None:
            return super().run([step])
        if stop != (len(step), True):
            raise ModelError(f"the loop stopped at layer {stop[0]}")
        return took_us


SentContender.timed = (
    Timed("bookkeeping", SentContender, "answer"),
    Timed("kernels", kernel_driver, "run_layer"),
    Timed("after the release", Session, "settle"),
    Timed("link", TorchAccelerator, "copy_to_slot"),
)
"""A card waits for what is not after the release of its layer: bookkeeping, here with planning and launching."""
SECTIONS = tuple(dict.fromkeys(item.section for item in (*TIMED, *SentContender.timed)))
OVERHEAD = tuple(name for name in SECTIONS if name not in BESIDE)


def measure(request: Request) -> dict[str, Any]:
    """us of a layer call, and of its sections, per contender."""
    remark = busy_warning()
    policies: list[str | None] = [None, *request.policies]
    contenders = [_measure_one(request, policy, Contender) for policy in policies]
    contenders += [_measure_one(request, policy, SentContender) for policy in request.policies]
    contenders += [_measure_loop(request, policy) for policy in request.policies if policy in LOOPED]
    return {"request": asdict(request), "machine": machine(), "remark": remark, "contenders": contenders}


def _measure_one(request: Request, policy: Any, kind: type[Contender]) -> dict[str, Any]:
    contender = kind(request, policy)
    layer_us: list[float] = []
    watches: list[Stopwatch] = []
    try:
        contender.check()
        steps = contender.calls(WARM_STEPS + request.steps)
        contender.run(steps[:WARM_STEPS])
        for _ in range(request.rounds):
            layer_us.append(_layer_us(contender, steps[WARM_STEPS:]))
            watch = Stopwatch("bookkeeping")
            with watch.watching(contender.timed):
                contender.run(steps[WARM_STEPS:])
            watches.append(watch)
    finally:
        contender.session.close()
    layer, overhead = spread(layer_us), spread([watch.median_us(_overhead_us) for watch in watches])
    return {
        "name": "CPU only" if policy is None else kind.name.format(policy),
        "lanes": "measured" if policy is None else kind.lanes,
        "layer_us": layer,
        "overhead_us": overhead,
        "sections_us": {
            name: spread([watch.median_us(partial(_section_us, name)) for watch in watches]) for name in SECTIONS
        },
        "held_up_us": spread([watch.median_us(_held_up_us) for watch in watches]),
        "share": overhead["median"] / layer["median"],
    }


def _measure_loop(request: Request, policy: str) -> dict[str, Any]:
    """us of a layer in a token's compiled loop, of which it tells the times itself."""
    contender = LoopContender(request, policy)
    layer_us: list[float] = []
    sections: dict[str, list[float]] = {name: [] for name in SECTIONS}
    try:
        contender.check()
        steps = contender.calls(WARM_STEPS + request.steps)
        contender.run(steps[:WARM_STEPS])
        for _ in range(request.rounds):
            us = [(contender.us_of_step(step), contender.loop.times_us()) for step in steps[WARM_STEPS:]]
            layer_us.append(sum(step_us for step_us, _ in us) / (len(us) * request.layers))
            released, kernels, after = np.median(np.concatenate([times for _, times in us], axis=1), axis=1).tolist()
            for name in SECTIONS:
                found = {"bookkeeping": released, "kernels": kernels, "after the release": after}.get(name, 0.0)
                sections[name].append(found)
    finally:
        contender.session.close()
    layer = spread(layer_us)
    overhead = spread([sum(sections[name][at] for name in OVERHEAD) for at in range(request.rounds)])
    return {
        "name": contender.name.format(policy),
        "lanes": contender.lanes,
        "layer_us": layer,
        "overhead_us": overhead,
        "sections_us": {name: spread(values) for name, values in sections.items()},
        "held_up_us": spread([0.0] * request.rounds),
        "share": overhead["median"] / layer["median"],
    }


def _section_us(name: str, call: dict[str, Times]) -> float:
    times = call.get(name, NOTHING)
    return times.cpu_us if name in OVERHEAD else times.wall_us


def _overhead_us(call: dict[str, Times]) -> float:
    return sum(_section_us(name, call) for name in OVERHEAD)


def _held_up_us(call: dict[str, Times]) -> float:
    """Outside kernels and waits: not running, because others had the core or Python's lock."""
    return sum(call[name].wall_us - call[name].cpu_us for name in OVERHEAD if name in call)


def _layer_us(contender: Contender, steps: list[list[Call]]) -> float:
    return contender.run(steps) / (len(steps) * len(contender.experts))
