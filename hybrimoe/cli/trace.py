"""`hybrimoe trace`: record the routing of a model, analyse it, train predictors on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.generate import read_file, read_prompt
from hybrimoe.cli.shared.deployment import deploy_config
from hybrimoe.cli.shared.files import check_folder, check_writable
from hybrimoe.cli.shared.options import (
    AcceleratorOption,
    ConfigOption,
    JsonOption,
    ModelArgument,
    PolicyOption,
    SlotsOption,
    UnknownKeysOption,
)
from hybrimoe.cli.shared.simulated import check_trace
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from scheduler.traces.trace import Trace

TARGETS = ("cache", "prefetch", "routes")
"""What `trace train` can learn."""


def register(app: typer.Typer) -> None:
    """Add `trace record`, `trace capture`, `trace import`, `trace analyze` and `trace train`."""
    group = typer.Typer(no_args_is_help=True, help="Record and analyse the expert routing of a model.")
    group.command("record")(record)
    group.command("capture")(capture)
    group.command("import")(import_)
    group.command("analyze")(analyze)
    group.command("train")(train)
    app.add_typer(group, name="trace")


def record(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .npz to write.")] = Path("trace.npz"),
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, one sequence each; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option("--prompt-file", help="A text file that is one prompt; repeatable.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Decode steps a prompt.")] = 64,
    horizon: Annotated[int, typer.Option(min=0, help="Layers ahead that are predicted.")] = 3,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same text.")] = 0,
    full_scores: Annotated[
        bool,
        typer.Option("--full-scores", help="Keep the gates' probabilities of all experts, not of routed ones only."),
    ] = False,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Keep the tokens' input embeddings: train --target routes needs them.")
    ] = False,
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids/--no-token-ids",
            help="Keep the tokens themselves, for predictions by token; the texts can be read from them.",
        ),
    ] = True,
    hidden: Annotated[
        int,
        typer.Option(
            "--hidden",
            metavar="N",
            min=0,
            help="Keep N random projections of each layer's hidden state, for predictions by hidden states (0: none; "
            "the model's width or more: the states themselves).",
        ),
    ] = 0,
    licence: Annotated[str, typer.Option(help="Licence of the trace, kept in the file.")] = "Apache-2.0",
    config: ConfigOption = None,
    unknown_keys: UnknownKeysOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate replies and record ids, weights and predicted routing of every layer, in prefill and decode."""
    from hybrimoe.generation import SamplingOptions

    texts = [*(prompt or ()), *_lines(prompts), *(read_prompt(None, path) for path in prompt_file or ())]
    options = SamplingOptions(max_new_tokens=new_tokens, temperature=temperature, seed=seed)
    check_writable(out)
    deployment = deploy_config(
        config, model=model, accelerator="none" if config is None else None, unknown_keys=unknown_keys
    )
    from hybrimoe.cli.shared.opening import open_model
    from hybrimoe.tracing.record import DEFAULT_PROMPTS, record_texts

    texts = texts or list(DEFAULT_PROMPTS)
    with open_model(deployment, show_progress=not as_json) as opened:
        trace = record_texts(
            opened.generator, texts, options, source=opened.name, licence=licence, horizon=horizon,
            embeddings=embeddings, full_scores=full_scores, token_ids=token_ids, hidden=hidden,
        )  # fmt: skip
    trace.save(out)
    _tell(out, trace, as_json)


def capture(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recording to write.")] = Path(
        "run.json.gz"
    ),
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")] = "Once upon a time",
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Decode steps.")] = 32,
    config: ConfigOption = None,
    accelerator: AcceleratorOption = None,
    slots: SlotsOption = None,
    policy: PolicyOption = None,
    unknown_keys: UnknownKeysOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate one reply and record every plan, demand, event and task, for `simulate --replay`.

    Experts run one by one on each lane meanwhile, so the run is slower than others. Without --accelerator and --config
    the accelerator is emulated.
    """
    check_writable(out)
    device = "emulated" if accelerator is None and config is None else accelerator
    deployment = deploy_config(
        config, model=model, accelerator=device, slots=slots, policy=policy, unknown_keys=unknown_keys
    )
    from hybrimoe.cli.shared.opening import open_model
    from hybrimoe.tracing.replay import capture_run

    with open_model(deployment, show_progress=not as_json) as opened:
        recording = capture_run(opened.generator, opened.session, prompt, new_tokens, opened.name)
    recording.save(out)
    facts = {"file": str(out), "plans": len(recording.plans), "tasks": len(recording.tasks),
             "bytes": out.stat().st_size, **recording.facts}  # fmt: skip
    if as_json:
        render.emit_json(facts)
    else:
        told = f"{facts['plans']} plans and {facts['tasks']} tasks ({recording.facts['lanes']})"
        render.out().print(f"{out}: {told}; replay it with: hybrimoe simulate --replay {out}", soft_wrap=True)


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="llama.cpp's moe-trace (.csv), responses with routed_experts of vLLM or SGLang (.json, .jsonl), ids"
            " [tokens, layers, k] or a collection of MoE-Infinity (.npy).",
        ),
    ],
    model_shape: Annotated[
        str,
        typer.Option(
            "--model-shape", metavar="M", help="Shape of the recorded model: a name, config.json, or directory."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .npz to write.")] = Path("trace.npz"),
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the prompt in each .npy file; other formats say so.")
    ] = 0,
    licence: Annotated[str, typer.Option(help="Licence of the trace, kept in the file.")] = "unknown",
    as_json: JsonOption = False,
) -> None:
    """Turn routing that another program recorded into a trace, for simulate, analyze, bench ablation and train."""
    check_writable(out)
    from hybrimoe.machine.profiles import open_shape
    from hybrimoe.tracing.importing import import_traces

    trace = import_traces(files, open_shape(model_shape), prompt_tokens=prompt_tokens, licence=licence)
    trace.save(out)
    _tell(out, trace, as_json)
    if "order" in trace.meta:
        render.note("the file has counts of whole sequences: tokens were drawn that have them, in no recorded order")


def _tell(out: Path, trace: Trace, as_json: bool) -> None:
    """What is in a trace that was written."""
    n_sequences = len(trace.sequence_spans())
    facts = {"file": str(out), "tokens": trace.n_tokens, "sequences": n_sequences, "layers": trace.n_layers,
             "experts": trace.n_experts, "top_k": trace.top_k, "bytes": out.stat().st_size}  # fmt: skip
    if as_json:
        render.emit_json(facts)
    else:
        of = f"{n_sequences} sequence{'s' if n_sequences > 1 else ''}"
        told = f"{trace.n_tokens} tokens of {of}, {trace.n_layers} layers of {trace.n_experts} experts"
        render.out().print(f"{out}: {told}", soft_wrap=True)


def _lines(path: Path | None) -> list[str]:
    from hybrimoe.errors import PromptError

    if path is None:
        return []
    found = [line.strip() for line in read_file(path).splitlines() if line.strip()]
    if not found:
        raise PromptError(f"{path} holds no prompt: expected one a line")
    return found


def analyze(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="An .npz trace, or demo.")] = "demo",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained HTML page.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the plots as PNG files.")] = None,
    slow_tokens: Annotated[int, typer.Option(min=2, help="Tokens for SCH and the planner's cache policies.")] = 400,
    as_json: JsonOption = False,
) -> None:
    """Hit-rate curves, SRP and SCH, reuse, load, predictors, and whether the model suits offloading."""
    check_trace(trace)
    check_writable(html)
    check_folder(plots)
    from hybrimoe.tracing.sources import load_trace
    from hybrimoe.tracing.study.analyse import analyse
    from hybrimoe.tracing.study.report import tables, write_figures, write_html

    report = analyse(load_trace(trace), slow_tokens=slow_tokens)
    written = [] if plots is None else write_figures(report, plots)
    if html is not None:
        write_html(report, html)
        written.append(html)
    if as_json:
        render.emit_json(report)
    else:
        for title, columns, rows in tables(report):
            render.out().print(render.table(title, columns, rows))
            render.out().print()
        render.out().print(report["verdict"]["text"])
    for path in written:
        render.note(f"written: {path}")


def train(
    traces: Annotated[
        list[str] | None, typer.Argument(metavar="TRACE...", help=".npz traces of one model, or demo.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .onnx to write.")] = Path(
        "predictor.onnx"
    ),
    target: Annotated[
        str, typer.Option(help="cache (next use), prefetch (next layer's routing), or routes (a prompt's reply).")
    ] = "cache",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same predictor.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train the small net of the `learned` policies; it is judged on the last quarter of the sequences.

    With --target routes: ExpertFlow's predictor, for `generate --batching expertflow --route-predictor`; it learns from
    traces that were recorded with --embeddings and is judged on every fourth sequence.
    """
    from hybrimoe.errors import ConfigError, unknown

    if target not in TARGETS:
        raise ConfigError(unknown("target", target, TARGETS))
    for name in traces or ():
        check_trace(name)
    check_writable(out)
    from hybrimoe.tracing.learning.learn import train_predictor
    from hybrimoe.tracing.learning.learn_routes import TARGET, train_routes
    from hybrimoe.tracing.sources import load_trace

    loaded = [load_trace(name) for name in traces or ["demo"]]
    make = train_routes if target == TARGET else train_predictor
    found = make(loaded, target, out, epochs=epochs, seed=seed)
    if as_json:
        render.emit_json(found)
    else:
        rows = [(key, f"{value:.4f}" if isinstance(value, float) else str(value)) for key, value in found.items()]
        render.out().print(render.table(f"Predictor {out}", ("", ""), rows))
