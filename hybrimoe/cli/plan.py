"""`hybrimoe plan`: what of a model fits a machine, and what to expect; reads the configuration only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from hybrimoe.cli.common import JsonOption, ModelArgument
from hybrimoe.cli.views import render


def register(app: typer.Typer) -> None:
    """Add `plan`."""
    app.command("plan")(plan)


def plan(
    model: ModelArgument = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="Hardware profile: a name or a file. Default: this machine's calibration, else a datasheet."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens that the KV cache must hold.")] = 8192,
    expert_dtype: Annotated[str, typer.Option(help="float32, bfloat16, int8, or int4.")] = "int4",
    dense_dtype: Annotated[str, typer.Option(help="Weights outside the experts.")] = "int8",
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one device, like 12GiB. Default: profile.")
    ] = None,
    accelerators: Annotated[
        int | None, typer.Option(min=1, help="So many equal devices, a block of layers each. Default: profile.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory. Default: this machine's.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Policy of the expectation.")] = "ours",
    as_json: JsonOption = False,
) -> None:
    """Show experts per tier, KV room, and the expected hit rate and speed (simulated). No weights are read.

    MODEL may also be the name of a shipped shape, like qwen3-30b-a3b.
    """
    import psutil

    from hybrimoe.machine.profiles import hardware_for_plan, open_shape, with_accelerators
    from hybrimoe.tracing.sources import DEMO_MODEL
    from hybrimoe.tracing.study.planning import expect, fit
    from scheduler.planner.policies import resolve_policy

    resolve_policy(policy)
    shape = open_shape(model or DEMO_MODEL)
    profile, taken = hardware_for_plan(hardware, gpu_memory is not None)
    profile = with_accelerators(profile, accelerators, shared_link=False)
    host = psutil.virtual_memory().total if host_memory is None else _bytes(host_memory)
    found = fit(
        shape, profile, context=context, expert_dtype=expert_dtype, dense_dtype=dense_dtype,
        device_bytes=None if gpu_memory is None else _bytes(gpu_memory), host_bytes=host,
    )  # fmt: skip
    expected = expect(found, shape, profile, policy, expert_dtype, dense_dtype)
    render.note(taken)
    if as_json:
        render.emit_json({**asdict(found), "hardware_taken": taken, "expected": expected})
    else:
        _show(asdict(found), expected)


def _bytes(text: str) -> int:
    from hybrimoe.amounts import parse_amount
    from hybrimoe.errors import ConfigError

    amount = parse_amount(text)
    if amount.kind != "bytes":
        raise ConfigError(f"expected a size like 12GiB, found {text!r}")
    return int(amount.value)


def _show(found: dict[str, Any], expected: dict[str, Any]) -> None:
    size = found["expert_bytes"]

    def experts(count: int) -> str:
        return f"{count} of {found['n_experts']} ({count / found['n_experts']:.0%}, {_gib(count * size)})"

    rows = [
        ("dense weights on the device", _gib(found["dense_bytes"])),
        (f"KV cache of {found['context']} tokens", _gib(found["kv_bytes"])),
        ("experts in device slots", experts(found["device_experts"])),
        *_by_accelerator(found),
        ("experts in host memory", experts(found["host_experts"])),
        ("experts outside host memory", experts(found["disk_experts"])),
        ("longest context with a slot a layer", f"{found['max_context']} tokens"),
        ("expected hit rate (simulated)", f"{expected['hit_rate']:.0%}"),
        ("expected decode (simulated)", f"{expected['decode_tokens_per_s']:.1f} tokens/s"),
        ("expected prefill (simulated)", f"{expected['prefill_tokens_per_s']:.0f} tokens/s"),
    ]
    render.out().print(render.table(f"{found['model']} on {found['hardware']}", ("", ""), rows))


def _by_accelerator(found: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for each of several accelerators."""
    layers, slots = found["layers_by_accelerator"], found["experts_by_accelerator"]
    if len(layers) == 1:
        return []
    return [
        (f"  accelerator {unit}", f"{n_layers} MoE layers, {n_slots} slots")
        for unit, (n_layers, n_slots) in enumerate(zip(layers, slots, strict=True))
    ]


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"
