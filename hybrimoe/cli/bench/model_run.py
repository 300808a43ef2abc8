"""What benchmarks of whole models share: options, the measurement, and a table or JSON. `ContendersGroup` is that of
`bench decode` and `bench prefill`, `RepliesGroup` that of `bench parallel` and `bench speculate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hybrimoe.cli.bench import options
from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.files import check_readable, check_writable, writing
from hybrimoe.cli.shared.options import (
    AcceleratorOption,
    ConfigOption,
    DtypeOption,
    LossyList,
    SlotsOption,
    ThreadsOption,
    UnknownKeysOption,
)
from hybrimoe.cli.views import render, render_summary
from hybrimoe.cli.views.render_profile import profile_table

if TYPE_CHECKING:
    from hybrimoe.bench.model.measure import Request
    from hybrimoe.cli.shared.opening import Progress
    from hybrimoe.config.deploy import DeployConfig

LLAMA_KV = ("f16", "f16-flash", "q8_0", "q4_0")
LLAMA_WEIGHTS = ("q4_0", "bf16")
QUICK_TOKENS = 24
"""Tokens of a reply with --quick, at most."""


@dataclass(frozen=True, slots=True)
class ContendersGroup:
    """What is set side by side, where it runs, and how often it is measured."""

    shape: options.ShapeOption = None
    layers: options.LayersOption = None
    experts: options.ExpertsOption = None
    active: options.ActiveOption = None
    policy: options.PolicyList = None
    lossy: LossyList = None
    dtype: options.DtypeList = None
    compare_policies: Annotated[
        bool,
        typer.Option(
            "--compare-policies", help="Cache off against cache on: no slots, then the known policies and ours."
        ),
    ] = False
    plain: Annotated[bool, typer.Option("--plain/--no-plain", help="Plain transformers beside it.")] = True
    gguf: Annotated[
        str | None, typer.Option(metavar="FILE", help="A GGUF file for llama.cpp beside it (llama-cpp-python).")
    ] = None
    llama_cpp: Annotated[
        bool,
        typer.Option(
            "--llama-cpp",
            help="With --shape: llama.cpp on the same weights beside it (llama-cpp-python and gguf).",
        ),
    ] = False
    llama_weights: Annotated[str, typer.Option(metavar="q4_0|bf16", help="With --llama-cpp: its weights.")] = "q4_0"
    kv_dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--kv-dtype",
            metavar="auto|float32|bfloat16|int8|int4",
            help="How ours stores keys and values; may be repeated.",
        ),
    ] = None
    llama_kv: Annotated[
        list[str] | None,
        typer.Option(
            "--llama-kv",
            metavar="|".join(LLAMA_KV),
            help="How llama.cpp stores keys and values; may be repeated. f16 without flash attention.",
        ),
    ] = None
    rounds: options.RoundsOption = 7
    config: ConfigOption = None
    accelerator: AcceleratorOption = None
    slots: SlotsOption = None
    threads: ThreadsOption = None
    unknown_keys: UnknownKeysOption = None
    quick: options.QuickOption = False
    csv: options.CsvOption = None
    plot: options.PlotOption = None

    def measured(
        self, kind: Literal["decode", "prefill"], model: str | None, prompt_tokens: int, new_tokens: int, *,
        as_json: bool, profile: bool = False,
    ) -> None:  # fmt: skip
        """Measure them with prompts of `prompt_tokens` (and replies of `new_tokens`), and show what came out.

        The names of model, policies and dtypes are checked first, before anything heavy is imported.
        """
        from hybrimoe.errors import ConfigError, unknown
        from yaml_rules.shapes import shape_names

        if self.gguf is not None:
            check_readable(Path(self.gguf))
        check_writable(self.csv)
        check_writable(self.plot)
        if self.shape is not None and self.shape not in shape_names():
            raise ConfigError(unknown("model shape", self.shape, shape_names()))
        deploy = partial(
            deploy_config, self.config, model=model if self.shape is None else None,
            accelerator=self._accelerator(), threads=self.threads, unknown_keys=self.unknown_keys,
        )  # fmt: skip
        for name in self.llama_kv or ():
            if name not in LLAMA_KV:
                raise ConfigError(unknown("way of llama.cpp to store keys and values", name, LLAMA_KV))
        if self.llama_weights not in LLAMA_WEIGHTS:
            raise ConfigError(unknown("kind of weights for llama.cpp", self.llama_weights, LLAMA_WEIGHTS))
        if self.llama_kv and not (self.llama_cpp or self.gguf):
            raise ConfigError("--llama-kv goes with --llama-cpp or --gguf: nothing of llama.cpp is measured otherwise")
        for dtype in self.dtype or ():
            deploy(dtype=dtype)
        for kv_dtype in self.kv_dtype or ():
            deploy(kv_dtype=kv_dtype)
        for policy in (None, *(self.policy or ())):
            deploy(policy=policy, slots=self._slots())
        from hybrimoe.bench.model.measure import Request

        request = Request(
            kind=kind,
            model=model,
            shape=self.shape,
            layers=self.layers,
            experts=self.experts,
            active=self.active,
            policies=tuple(self.policy or ()),
            lossy=tuple(self.lossy or ()),
            dtypes=tuple(self.dtype or ()),
            compare_policies=self.compare_policies,
            plain=self.plain,
            gguf=self.gguf,
            llama_cpp=self.llama_cpp,
            kv_dtypes=tuple(self.kv_dtype or ()),
            llama_kv=tuple(self.llama_kv or ()),
            llama_weights=self.llama_weights,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=min(self.rounds, options.QUICK_ROUNDS) if self.quick else self.rounds,
            slots=self._slots(),
            profile=profile,
            deploy=deploy,
        )
        measure_and_show(request, csv=self.csv, plot=self.plot, as_json=as_json)

    def _is_as_served(self) -> bool:
        """Whether a shape is to run as a model of it would, not as the demo model, whose preset shows scheduling on
        every machine: nobody has chosen how it runs, or compares what needs slots."""
        asked = self.config or self.slots or self.policy or self.lossy or self.compare_policies
        return self.shape is not None and not asked

    def _accelerator(self) -> str | None:
        return "auto" if self.accelerator is None and self._is_as_served() else self.accelerator

    def _slots(self) -> str | None:
        return "auto" if self._is_as_served() else self.slots


@dataclass(frozen=True, slots=True)
class RepliesGroup:
    """Of which model the replies are, on the CPU alone, and whether few of them do."""

    shape: options.ShapeOption = None
    layers: options.LayersOption = None
    config: ConfigOption = None
    dtype: DtypeOption = None
    threads: ThreadsOption = None
    quick: options.QuickOption = False

    def deployment(self, model: str | None) -> DeployConfig:
        """The deployment of `model`, or of a shape. Raises ConfigError before anything heavy is imported."""
        from hybrimoe.errors import ConfigError

        if model is not None and self.shape is not None:
            raise ConfigError(f"give a model ({model}) or --shape {self.shape}, not both")
        if self.layers is not None and self.shape is None:
            raise ConfigError("--layers goes with --shape: a checkpoint is measured whole")
        return deploy_config(self.config, model=model, accelerator="none", dtype=self.dtype, threads=self.threads)

    def sizes(self, new_tokens: int, rounds: int) -> tuple[int, int]:
        """Tokens of a reply and counted rounds: those given, or fewer with --quick."""
        if not self.quick:
            return new_tokens, rounds
        return min(new_tokens, QUICK_TOKENS), min(rounds, options.QUICK_ROUNDS)

    def measured(
        self, measure: Callable[[Progress], dict[str, Any]], show: Callable[[dict[str, Any]], None], *, as_json: bool
    ) -> None:
        """Measures, and shows what came out: by `show`, or as one JSON document."""
        result = _measured(measure)
        if as_json:
            render.emit_json(result)
        else:
            show(result)


def _measured(measure: Callable[[Progress], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, with a progress bar, and a remark before it if the machine is busy."""
    from hybrimoe.bench import rounds
    from hybrimoe.cli.shared.opening import progress_bar, quiet_libraries

    quiet_libraries()
    warning = rounds.busy_warning()
    if warning:
        render.note(warning)
    with progress_bar() as progress:
        return measure(progress)


def measure_and_show(request: Request, *, csv: Path | None, plot: Path | None, as_json: bool) -> None:
    """Measures the contenders of a request; prints one table, or one JSON document, and writes the files asked for."""
    from hybrimoe.bench.model.measure import measure, write_csv, write_plot

    result = _measured(partial(measure, request))
    if csv is not None:
        with writing(csv):
            write_csv(result, csv)
    if plot is not None:
        write_plot(result, plot)
    if as_json:
        render.emit_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Prints what `bench.model.measure` returned: a line a contender, then the machine. Columns that no contender has
    are left out."""
    rows = result["results"]
    first = rows[0]["tokens_per_s"]["median"]
    speeds = [row["tokens_per_s"] for row in rows]
    columns: dict[str, list[str]] = {
        "": [row["name"] for row in rows],
        "tokens/s": [f"{speed['median']:.1f}" for speed in speeds],
        "spread": [f"{speed['min']:.1f}-{speed['max']:.1f}" for speed in speeds],
        " ": [f"{speed['median'] / first:.2f}x" for speed in speeds],
        "of read rate": [render_summary.percent(row["of_read_rate"]) for row in rows],
        "hits": [render_summary.percent(row["hit_rate"]) for row in rows],
        "prefetch": [render_summary.percent(row["prefetch_precision"]) for row in rows],
        "cosine": ["-" if row["logits_cosine"] is None else f"{row['logits_cosine']:.4f}" for row in rows],
        "MiB": [f"{row['resident_mib']:.0f}" for row in rows],
    }
    shown = {title: cells for title, cells in columns.items() if any(cell != "-" for cell in cells)}
    lines = list(zip(*shown.values(), strict=True))
    sizes = [f"{name} {result[name]}" for name in ("layers", "experts", "active") if name in result]
    model = ", ".join([f"{result['model']} ({result['weights']} weights)", *sizes])
    what = f"{result['bench']}, {model}, prompt {result['prompt_tokens']}"
    render.out().print(render.table(f"{what}, {result['rounds']} alternating rounds", tuple(shown), lines))
    for row in rows:
        if "profile" in row:
            render.out().print(profile_table(row["profile"], f"{row['name']} ({row['provenance']})"))
    described = result["machine"]
    render.out().print(
        f"measured on {described['cpu']}, {described['cores']} cores, {result['threads']} threads each, torch"
        f" {described['torch']}"
        + ("; the accelerator is emulated" if any("emulated" in row["provenance"] for row in rows) else ""),
        style="dim",
    )
