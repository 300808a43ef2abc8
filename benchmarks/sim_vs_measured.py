"""Simulated against measured time on the emulated accelerator.

    python benchmarks/sim_vs_measured.py [--policy ours ...] [--steps 40] [--rounds 3] [--plot error.png] [--json]

A model with random weights decodes on the runtime: CPU kernels for real, accelerator and link emulated and paced to a
profile. For each policy and round a new session measures its profile at its start, as every session does. Each step
after the first ``LAG_STEPS`` is then predicted by what was known before it ran: the session's cost model with its drift
at that moment, and the median lags of the lanes (dispatch, wake-up) in the ``LAG_STEPS`` steps before. Simulated is one
task graph of the plans with these costs; only the time between layers (attention, router, planning) is taken as
measured. Printed: the median of |simulated - measured| / measured over steps for the time in which layers ran, by
round; the same with the recorded durations in place of the predicted ones (the lags are still those before), which
tells the schedule's error from the durations'. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, cast

from hybrimoe.cli.views.waiting import set_wait_policy

set_wait_policy(["bench"])  # before torch is imported: so the imports below stand behind it

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from cpu_kernels import CpuBackend, Dispatch, ExpertSpec  # noqa: E402
from gpu_kernels import EmulatedAccelerator  # noqa: E402
from hybrimoe.experts.layout import find_experts  # noqa: E402
from hybrimoe.runtime import RuntimeConfig, Session  # noqa: E402
from hybrimoe.runtime.startup.backends import pacing_of  # noqa: E402
from hybrimoe.tracing.study import plots  # noqa: E402
from scheduler import CostModel  # noqa: E402
from scheduler.machine.profile import AccelProfile, CpuProfile, HardwareProfile, LinkProfile  # noqa: E402
from scheduler.recording.retiming import Retiming, StepTime  # noqa: E402

LAYERS, EXPERTS, TOP_K, HIDDEN, INTER = 6, 16, 4, 1024, 1024
#: The emulated device: an expert of 6.3 MB (bfloat16) takes 0.1 ms there and 1.5 ms over the link; the host's CPU lane
#: takes about 0.3 ms.
PACING = HardwareProfile(
    name="paced emulation",
    provenance="datasheet",
    source="made up: copies slower than the host's memory, so that the pace decides",
    cpu=CpuProfile(read_gbps=10.0, gflops={"bfloat16": 50.0}),
    accel=AccelProfile(mem_gbps=64.0, tflops=1.0, launch_us=5.0),
    link=LinkProfile(gbps=4.2, latency_us=5.0),
)
POLICIES = ("static", "freetoken", "hybrimoe", "ours")
LAG_STEPS = 20


class DeviceKernel:
    """What the host does for the device: nothing but zero rows, so that the device takes no host core, as a real one.

    The outputs are wrong, and nothing but the time is looked at.
    """

    name = "device"

    def supports(self, spec: ExpertSpec) -> str | None:
        """Everything."""
        return None

    def run(
        self, spec: ExpertSpec, records: object, positions: NDArray[np.int32], dispatch: Dispatch, hidden: object,
        rows: NDArray[np.float32],
    ) -> None:  # fmt: skip
        """Zeroes the rows of the experts at ``positions``."""
        for at in positions.tolist():
            rows[dispatch.rows[dispatch.offsets[at] : dispatch.offsets[at + 1]]] = 0.0


class Round(NamedTuple):
    """Step times of one session: predicted before each step, and with recorded durations and the lags before it."""

    predicted: list[StepTime]
    recorded: list[StepTime]


def build_model() -> torch.nn.Module:
    """A mixture-of-experts model with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=HIDDEN, moe_intermediate_size=INTER,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        decoder_sparse_step=1, max_position_embeddings=512, norm_topk_prob=True,
    )  # fmt: skip
    model: torch.nn.Module = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    return model.eval()


def open_session(model: torch.nn.Module, policy: str) -> Session:
    """The model's experts on the emulated accelerator, a quarter of them cached."""
    session = Session(RuntimeConfig(accelerator="emulated", gpu_expert_slots=0.25, policy=policy, threads=1))
    for path, module in find_experts(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, session.add_layer(path, module))
    device = EmulatedAccelerator(cast(CpuBackend, DeviceKernel()), pacing_of(PACING), poison=False)
    session.finalize(model, accelerator=device)
    return session


def decode(model: torch.nn.Module, step: int) -> None:
    """A single token on its own: the experts are the same work as with a cache."""
    with torch.inference_mode():
        model(input_ids=torch.tensor([[(7 * step) % 512]]), use_cache=False)


def measure(policy: str, steps: int) -> Round:
    """One session of one policy."""
    model = build_model()
    session = open_session(model, policy)
    try:
        session.record_timeline(True)
        known = [_costs_now(session)]
        for step in range(LAG_STEPS + steps):
            decode(model, step)
            known.append(_costs_now(session))
        session.record_timeline(False)
        plans = session.plans
        first = plans[0].plan.step
        joined = Retiming(plans, session.timeline, session.layer_specs()[0].spec.record_bytes)
        lags = {step: joined.lags(step - LAG_STEPS, step) for step in {item.plan.step for item in plans}}
        predicted = joined.step_times(lambda step: known[step - first], lambda step: lags[step])
        recorded = joined.step_times(None, lambda step: lags[step])
        return Round(*(_after(times, first + LAG_STEPS) for times in (predicted, recorded)))
    finally:
        session.close()


def _costs_now(session: Session) -> CostModel:
    assert session.costs is not None
    return CostModel.from_mapping(session.costs.as_mapping())


def _after(times: Sequence[StepTime], begin: int) -> list[StepTime]:
    return [time for time in times if time.step >= begin]


def told(policy: str, rounds: Sequence[Round]) -> dict[str, object]:
    """Plain data of a policy: error by round, over all steps, and how much of it the schedule alone has."""
    by_round = [median(time.error for time in found.predicted) for found in rounds]
    steps = [time for found in rounds for time in found.predicted]
    return {
        "policy": policy,
        "steps": len(steps),
        "simulated_us": median(time.simulated_us for time in steps),
        "measured_us": median(time.recorded_us for time in steps),
        "median_error": median(time.error for time in steps),
        "error_by_round": by_round,
        "p90_error": float(np.percentile([time.error for time in steps], 90)),
        "schedule_error": median(time.error for found in rounds for time in found.recorded),
        "kind": "simulated against measured (emulated accelerator)",
    }


def main() -> None:
    """Print the errors of each policy and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", nargs="+", default=list(POLICIES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Round]] = {policy: [] for policy in arguments.policy}
    for _ in range(arguments.rounds):
        for policy, rounds in found.items():
            rounds.append(measure(policy, arguments.steps))
    rows = [told(policy, rounds) for policy, rounds in found.items()]
    print(json.dumps(rows, indent=2) if arguments.json else "\n".join(map(line, rows)))
    if arguments.plot is not None:
        arguments.plot.write_bytes(drawn(found))


def line(row: dict[str, object]) -> str:
    """A row for people."""
    by_round = ", ".join(f"{error:.1%}" for error in sorted(cast(list[float], row["error_by_round"])))
    return (
        f"{row['policy']:10s} {row['steps']} steps: simulated {row['simulated_us']:.0f} us, measured (emulated "
        f"accelerator) {row['measured_us']:.0f} us; median error {row['median_error']:.1%} (rounds {by_round}), "
        f"90th percentile {row['p90_error']:.1%}; with recorded durations {row['schedule_error']:.1%}"
    )


def drawn(found: dict[str, list[Round]]) -> bytes:
    """Error by percentile of steps, PNG."""
    shares = [float(share) for share in np.linspace(0, 100, 21)]
    curves = {
        policy: [float(v) for v in np.percentile([t.error for r in rounds for t in r.predicted], shares)]
        for policy, rounds in found.items()
    }
    return plots.lines("Simulated against measured", "percentile of steps", "error", shares, curves)


if __name__ == "__main__":
    main()
