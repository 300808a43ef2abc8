"""Recordings of real runs: made by `trace capture`, followed by `simulate --replay`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybrimoe.errors import ConfigError
from hybrimoe.extensions.policies import open_policy
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.machine.facts import environment
from hybrimoe.runtime import Session
from scheduler.recording.recording import Recording
from scheduler.recording.replay import replay
from scheduler.recording.retiming import Retiming, StepTime


def capture_run(
    generator: TextGenerator, session: Session | None, prompt: str, new_tokens: int, model: str
) -> Recording:
    """Generates greedily and returns the recording. Raises ConfigError where nothing was injected, ModelError where
    nothing is planned."""
    if session is None:
        raise ConfigError("nothing was injected into this model, so there are no plans to record")
    session.record_run()
    options = SamplingOptions(max_new_tokens=new_tokens, temperature=0.0)
    "".join(generator.reply(generator.encode(prompt), options))
    recording = session.recording
    stats = session.stats()
    lanes = "emulated accelerator, measured" if stats.accelerator_kind == "emulated" else "measured"
    recording.facts = {"model": model, "policy": stats.policy, "accelerator": stats.accelerator, "lanes": lanes,
                       "n_slots": stats.n_slots, "versions": environment()}  # fmt: skip
    return recording


def replay_file(path: Path) -> dict[str, Any]:
    """What the replay of a file says, as plain data; times are sums over the steps of a phase, in us."""
    recording = Recording.load(path)
    open_policy(recording.setup["policy"])
    found = replay(recording)
    joined = Retiming(recording.plans, recording.tasks, recording.expert_bytes)
    return {
        "file": str(path),
        **{key: value for key, value in asdict(found).items() if key != "divergence"},
        "exact": found.exact,
        "hit_rate": found.hit_rate,
        "divergence": None if found.divergence is None else asdict(found.divergence),
        "phases": _phases(joined.step_times(), joined.replayed()),
        "facts": recording.facts,
        "versions": environment(),
        "kind": "simulated",
    }


def _phases(durations: list[StepTime], replayed: list[StepTime]) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    for plain, full in zip(durations, replayed, strict=True):
        sums = result.setdefault(plain.phase, {"steps": 0, "recorded_us": 0.0, "durations_us": 0.0, "replayed_us": 0.0})
        sums["steps"] += 1
        sums["recorded_us"] += plain.recorded_us
        sums["durations_us"] += plain.simulated_us
        sums["replayed_us"] += full.simulated_us
    return result
