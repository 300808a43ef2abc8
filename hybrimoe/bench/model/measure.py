"""What `bench decode` and `bench prefill` measure: which contenders are asked for, and their rounds."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

from cpu_kernels.engine.bandwidth import ReadBandwidth
from cpu_kernels.host.threads import resolve_threads
from hybrimoe.bench import rounds as harness
from hybrimoe.bench.model import contenders
from hybrimoe.config.deploy import DeployConfig
from hybrimoe.config.runtime import runtime_config
from hybrimoe.errors import ConfigError
from hybrimoe.machine.facts import machine
from hybrimoe.tracing.study.plots import new_figure

COMPARED_POLICIES = ("static", "llama_cpp", "hybrimoe", "ours")
"""What --compare-policies sets beside `cache off`: the best known placements, then ours."""

PARITY_TOKENS = 1024
"""Of the prompt, for comparing logits before anything is timed: several runs of attention, and no long wait."""

CACHE_OFF = "cache off (CPU only)"


@dataclass(frozen=True, slots=True)
class Request:
    """One command line of `bench decode` or `bench prefill`.

    deploy: the deployment with some options replaced (policy, slots, dtype, lossy), as of
    `cli.shared.deployment.deploy_config`.
    profile: of decode, after the rounds: where a token's time goes, for each contender in this process.
    kv_dtypes: how the hybrid contenders store keys and values, each in turn; llama_kv: the same of llama.cpp, by the
    names of `contenders.LLAMA_KV`, with "-flash" behind them for flash attention. llama_weights: of the file that is
    written for it, one of `gguf_file.WEIGHTS`. experts, active: how many there are in a layer of a shape, and how many
    a token takes, where that is not as in the shape.
    """

    kind: Literal["decode", "prefill"]
    model: str | None
    shape: str | None
    layers: int | None
    policies: tuple[str, ...]
    dtypes: tuple[str, ...]
    compare_policies: bool
    plain: bool
    gguf: str | None
    prompt_tokens: int
    new_tokens: int
    rounds: int
    slots: str | None
    deploy: Callable[..., DeployConfig]
    lossy: tuple[str, ...] = ()
    llama_cpp: bool = False
    profile: bool = False
    kv_dtypes: tuple[str, ...] = ()
    llama_kv: tuple[str, ...] = ()
    llama_weights: str = "q4_0"
    experts: int | None = None
    active: int | None = None

    def variants(self) -> list[tuple[str, dict[str, Any]]]:
        """(label, overrides of the deployment) of each hybrid contender, in the order in which they are shown."""
        policies: tuple[str | None, ...] = COMPARED_POLICIES if self.compare_policies else self.policies or (None,)
        found: list[tuple[str, dict[str, Any]]] = []
        for dtype in self.dtypes or (None,):
            if self.compare_policies:
                found.append((CACHE_OFF, {"slots": "0", "dtype": dtype}))
            for policy in policies:
                named, common_to_all = (
                    policy or "as configured",
                    {"policy": policy, "slots": self.slots, "dtype": dtype},
                )
                found.append((named, common_to_all))
                found += [(f"{named} + {lossy}", {**common_to_all, "lossy": lossy}) for lossy in self.lossy]
        if len(self.dtypes) > 1:
            found = [(f"{label} {overrides['dtype']}", overrides) for label, overrides in found]
        if not self.kv_dtypes:
            return found
        return [
            (f"{label}, {kv_dtype} keys and values", {**overrides, "kv_dtype": kv_dtype})
            for label, overrides in found
            for kv_dtype in self.kv_dtypes
        ]

    @property
    def threads(self) -> int:
        """Of the hybrid contenders, and so of their peers."""
        return resolve_threads(runtime_config(self.deploy()).threads)

    @property
    def context_tokens(self) -> int:
        """Prompt and reply together."""
        return self.prompt_tokens + self.new_tokens


def measure(request: Request, progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    """The whole comparison as plain data."""
    vocab_size, openers = _openers(request, progress)
    prompt_ids = _prompt(vocab_size, request.prompt_tokens)
    with contenders.all_open(openers) as opened:
        cosines = contenders.check_parity(opened, prompt_ids[:PARITY_TOKENS])
        subjects = {contender.label: contender for contender in opened}
        if request.kind == "decode":
            values = harness.alternate(
                subjects, lambda it: it.decode(prompt_ids, request.new_tokens), request.rounds, progress=progress
            )
        else:
            values = harness.alternate(subjects, lambda it: it.prefill(prompt_ids), request.rounds, progress=progress)
        read_gbps = _read_gbps(request.threads) if request.kind == "decode" else None
        rows = [_row(contender, values[contender.label], cosines, read_gbps) for contender in opened]
        if request.profile:
            for row, contender in zip(rows, opened, strict=True):
                if isinstance(contender, contenders.Contender):
                    row["profile"] = contender.profile(prompt_ids, request.new_tokens)
    return {
        "bench": request.kind,
        "model": request.shape or request.model or "demo",
        "weights": "random" if request.shape else "checkpoint",
        "prompt_tokens": request.prompt_tokens,
        **({"new_tokens": request.new_tokens} if request.kind == "decode" else {}),
        **{
            name: getattr(request, name)
            for name in ("layers", "experts", "active")
            if getattr(request, name) is not None
        },
        "rounds": request.rounds,
        "threads": request.threads,
        "read_gbps": read_gbps,
        "machine": machine(),
        "results": rows,
    }


def write_csv(result: dict[str, Any], path: Path) -> None:
    """One line a contender; medians, least and greatest instead of every round."""
    lines = []
    for row in result["results"]:
        speed = row["tokens_per_s"]
        speeds = {f"tokens_per_s_{kind}": speed[kind] for kind in ("median", "min", "max")}
        lines.append({
            **{name: result[name] for name in ("bench", "model", "weights", "prompt_tokens", "rounds", "threads")},
            **{name: value for name, value in row.items() if name != "tokens_per_s"},
            **speeds,
            "cpu": result["machine"]["cpu"],
        })  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Medians as bars, with the rounds as points. Raises MissingExtraError without matplotlib."""
    figure, axis = new_figure(2.5 + 1.2 * len(result["results"]), 3.6)
    for at, row in enumerate(result["results"]):
        speed = row["tokens_per_s"]
        axis.bar(at, speed["median"], 0.6)
        axis.plot([at] * len(speed["rounds"]), speed["rounds"], "k.", markersize=3)
    axis.set_xticks(range(len(result["results"])), [row["name"] for row in result["results"]], fontsize=8)
    axis.set(ylabel="tokens/s", title=f"{result['bench']}, {result['model']}, measured on {result['machine']['cpu']}")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


def _read_gbps(n_threads: int) -> float:
    """What this machine reads with as many threads, in 10^9 bytes a second: the median of five passes."""
    rate = ReadBandwidth(threads=n_threads)
    return median(rate.measure() for _ in range(5))


def _row(contender: Any, values: Sequence[float], cosines: dict[str, float], read_gbps: float | None) -> dict[str, Any]:
    counters = contender.counters[1:]  # the first round only warmed up
    accelerated = any(c["slots"] for c in counters)
    resolved = sum(c["prefetches_used"] + c["prefetches_wasted"] for c in counters)
    activated = sum(c["activated"] for c in counters)
    return {
        "name": contender.label,
        "provenance": "measured, accelerator emulated" if any(c["emulated"] for c in counters) else "measured",
        "dtype": contender.dtype,
        "tokens_per_s": harness.spread(values),
        "step_bytes": contender.step_bytes,
        "of_read_rate": (
            contender.step_bytes * median(values) / (read_gbps * 1e9) if read_gbps and contender.step_bytes else None
        ),
        "hit_rate": sum(c["hits"] for c in counters) / activated if accelerated and activated else None,
        "prefetch_precision": sum(c["prefetches_used"] for c in counters) / resolved if resolved else None,
        "overhead_share": _share(counters, "overhead_us"),
        "logits_cosine": cosines.get(contender.label),
        "open_s": contender.open_s,
        "resident_mib": contender.resident_mib,
    }


def _share(counters: Sequence[dict[str, Any]], name: str) -> float | None:
    wall = sum(c["wall_us"] for c in counters)
    return sum(c[name] for c in counters) / wall if wall else None


def _prompt(vocab_size: int, n_tokens: int) -> list[int]:
    import numpy as np

    return [int(token) for token in np.random.default_rng(contenders.SEED).integers(3, vocab_size, n_tokens)]


def _openers(request: Request, progress: Any) -> tuple[int, list[Callable[[ExitStack], Any]]]:
    """The vocabulary's size and one opener a contender."""
    source = _source(request)
    openers: list[Callable[[ExitStack], Any]] = []
    if request.plain:
        openers.append(lambda stack: contenders.plain("transformers", source.plain(), source.tokenizer))
    for label, overrides in request.variants():
        deployment = request.deploy(**overrides)

        def opener(stack: ExitStack, label: str = label, deployment: Any = deployment) -> Any:
            make = partial(source.hybrid, deployment, progress)
            lossy = runtime_config(deployment).lossy is not None
            return stack.enter_context(contenders.hybrid(label, make, source.tokenizer, lossy))

        openers.append(opener)
    written: list[Path] = []

    def own_file(stack: ExitStack) -> str:
        """The weights of a random source, written once, to a file that goes with the benchmark."""
        if not written:
            path = Path(stack.enter_context(TemporaryDirectory(prefix="hybrimoe-"))) / f"{request.shape}.gguf"
            source.gguf(path, progress, weights=request.llama_weights)
            written.append(path)
        return str(written[0])

    def peer(name: str, of: Callable[[ExitStack], str], stack: ExitStack) -> contenders.LlamaCpp:
        kv, _, flash = name.partition("-")
        path = of(stack)
        return contenders.LlamaCpp(path, request.threads, request.context_tokens, kv=kv, flash=bool(flash))

    if request.llama_cpp and request.shape is None:
        raise ConfigError("--llama-cpp goes with --shape: of a checkpoint give its GGUF file with --gguf")
    for name in request.llama_kv or ("f16",):
        if request.gguf is not None:
            openers.append(partial(peer, name, lambda stack: str(request.gguf)))
        if request.llama_cpp:
            openers.append(partial(peer, name, own_file))
    return source.vocab_size, openers


def _source(request: Request) -> Any:
    from hybrimoe.bench.model.sources import CheckpointSource, RandomSource, other_experts

    if request.shape is None:
        given = {"--layers": request.layers, "--experts": request.experts, "--active": request.active}
        for name in (name for name, value in given.items() if value is not None):
            raise ConfigError(f"{name} goes with --shape: a checkpoint is measured as it is")
        return CheckpointSource(request.model)
    if request.model is not None:
        raise ConfigError(f"give a model ({request.model}) or --shape {request.shape}, not both")
    experts = other_experts(request.shape, request.experts, request.active)
    return RandomSource(request.shape, request.layers, request.context_tokens, replaced=experts)
