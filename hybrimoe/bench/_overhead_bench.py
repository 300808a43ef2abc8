"""The measurement behind `hybrimoe bench overhead`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from cpu_kernels import CpuBackend, ExpertSpec, ExpertWeights, reference_ffn, relative_error, tolerance
from gpu_kernels import EmulatedAccelerator
from hybrimoe.bench._harness import alternate, busy_warning, machine, spread
from hybrimoe.cli import render
from hybrimoe.errors import ModelError
from hybrimoe.runtime import HybridExperts, RuntimeConfig, Session
from scheduler import ModelShape
from yaml_rules.shapes import load_shape

SEED = 0
WEIGHT_SCALE = 0.02
GATE_SCALE = 2.0
"""Standard deviation of the router's logits."""
DRIFT = 0.3
"""Step of the random walk of hidden states: neighbouring tokens share about half of their experts."""
WARM_STEPS = 20


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


class NoKernel:
    """A backend that computes nothing: what a call still costs is overhead."""

    name = "nothing"

    def supports(self, spec: ExpertSpec) -> str | None:
        """Everything."""
        return None

    def run(self, *arguments: object) -> None:
        """Returns at once."""


class NoDevice(EmulatedAccelerator):
    """Lanes that copy nothing."""

    def _transfer(self, *arguments: object) -> None:
        """Returns at once."""


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


Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Contender:
    """One session; `null` sessions have kernels and copies that do nothing."""

    def __init__(self, request: Request, policy: str | None, null: bool) -> None:
        shape = ModelShape.from_mapping(load_shape(request.shape))
        self.top_k, self.hidden = shape.top_k, shape.hidden
        torch.manual_seed(SEED)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        accelerator = None
        if policy is not None:
            accelerator = NoDevice(cast(CpuBackend, NoKernel())) if null else EmulatedAccelerator()
        config = RuntimeConfig(
            "none", request.slots, request.dtype, policy=policy or "ours",  # type: ignore[arg-type]
            threads=1 if policy else None,
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
        if null:
            for layer in self.session.layers:
                layer.backend = cast(CpuBackend, NoKernel())

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

    def run(self, steps: list[list[Call]]) -> None:
        """All layers of all steps."""
        with torch.no_grad():
            for step in steps:
                for experts, call in zip(self.experts, step, strict=True):
                    experts(*call)

    def check(self) -> None:
        """Raises ModelError where the output of a call is not that of the reference."""
        layer = self.session.layer_specs()[0]
        hidden, index, weights = self.calls(1)[0][0]
        expected = sum(
            weight * reference_ffn(layer.spec, self.session.store.read(0, expert), hidden)
            for expert, weight in zip(index[0].tolist(), weights[0].tolist(), strict=True)
        )
        with torch.no_grad():
            error = relative_error(self.experts[0](hidden, index, weights), torch.as_tensor(expected))
        if error > tolerance(layer.spec):
            raise ModelError(f"refusing to measure: outputs differ from the reference by {error:.2g}")


def run(request: Request, *, as_json: bool) -> None:
    """Measures and prints."""
    result = measure(request)
    if as_json:
        render.emit_json(result)
        return
    if result["remark"]:
        render.note(result["remark"])
    rows = [
        (row["name"], f"{row['layer_us']['median']:.0f}", f"{row['overhead_us']['median']:.0f}",
         f"{row['share']:.1%}", f"{row['lanes']}")
        for row in result["contenders"]
    ]  # fmt: skip
    title = f"One MoE layer of {request.shape}, {request.dtype}, one token; us, median of {request.rounds} rounds"
    render.out().print(render.table(title, ("what runs", "layer us", "overhead us", "share", "overhead is"), rows))


def measure(request: Request) -> dict[str, Any]:
    """us of a layer call with and without kernels, per contender."""
    remark = busy_warning()
    names: list[str | None] = [None, *request.policies]
    contenders = []
    for policy in names:
        values = _measure_one(request, policy)
        layer, bare = spread(values["layer"]), spread(values["overhead"])
        contenders.append(
            {
                "name": "CPU only" if policy is None else f"emulated accelerator, {policy}",
                "lanes": "measured" if policy is None else "measured (accelerator emulated)",
                "layer_us": layer,
                "overhead_us": bare,
                "share": bare["median"] / layer["median"],
            }
        )
    return {"request": asdict(request), "machine": machine(), "remark": remark, "contenders": contenders}


def _measure_one(request: Request, policy: str | None) -> dict[str, list[float]]:
    real, bare = Contender(request, policy, null=False), Contender(request, policy, null=True)
    try:
        real.check()
        steps = real.calls(WARM_STEPS + request.steps)
        for contender in (real, bare):
            contender.run(steps[:WARM_STEPS])
        return alternate({"layer": real, "overhead": bare}, lambda c: _layer_us(c, steps[WARM_STEPS:]), request.rounds)
    finally:
        real.session.close()
        bare.session.close()


def _layer_us(contender: Contender, steps: list[list[Call]]) -> float:
    started = time.perf_counter()
    contender.run(steps)
    return (time.perf_counter() - started) * 1e6 / (len(steps) * len(contender.experts))
