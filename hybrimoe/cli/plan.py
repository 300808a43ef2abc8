"""`hybrimoe plan`: what of a model fits a machine, and what to expect; reads the configuration only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hybrimoe.cli.shared import simulated
from hybrimoe.cli.shared.deployment import rope_config
from hybrimoe.cli.shared.options import (
    FitOption,
    JsonOption,
    ModelArgument,
    RopeFactorOption,
    RopeOriginalOption,
    RopeScalingOption,
)
from hybrimoe.cli.views import render

if TYPE_CHECKING:
    from cpu_kernels import ExpertDtype
    from scheduler.machine.profile import HardwareProfile


def register(app: typer.Typer) -> None:
    """Add `plan`."""
    app.command("plan")(plan)


def plan(
    model: ModelArgument = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="Hardware profile: a name or a file. Default: this machine, calibrated or measured shortly."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the KV cache must hold. Default: 8192, or the model's own.")
    ] = None,
    expert_dtype: simulated.ExpertDtypeOption = "int4",
    dense_dtype: simulated.DenseDtypeOption = "int8",
    kv_dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE", help="Keys and values as float32, bfloat16, int8, int4, on the CPU; auto: in 16 bit."
        ),
    ] = "auto",
    rope_scaling: RopeScalingOption = None,
    rope_factor: RopeFactorOption = None,
    rope_original_context: RopeOriginalOption = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one device, like 12GiB. Default: profile.")
    ] = None,
    accelerators: Annotated[
        int | None, typer.Option(min=1, max=64, help="So many equal devices, a block of layers each. Default: profile.")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory. Default: this machine's.")
    ] = None,
    host_copy: Annotated[
        str,
        typer.Option(metavar="keep|drop", help="drop: experts in slots leave host memory (with --policy static)."),
    ] = "keep",
    parallel: Annotated[
        int | None, typer.Option(min=1, max=64, help="Replies at once that the KV cache must hold. Default: 1.")
    ] = None,
    fit_all: FitOption = False,
    policy: Annotated[str, typer.Option(metavar="NAME", help="Policy of the expectation, as in `simulate`.")] = "ours",
    as_json: JsonOption = False,
) -> None:
    """Show experts per tier, KV room, and the expected hit rate and speed (simulated). No weights are read.

    MODEL may also be the name of a shipped shape, like qwen3-30b-a3b. With --fit both dtypes are chosen, the most
    precise with which all experts fit host memory, and where they are not given context and replies at once, too.
    """
    from hybrimoe.checkpoint.meta import model_shape, packing_remark, with_kv_dtype
    from hybrimoe.machine.profiles import hardware_for_plan, open_hardware, with_accelerators

    rope = rope_config(rope_scaling, rope_factor, rope_original_context)
    shape = with_kv_dtype(model_shape(model, rope=rope), model, kv_dtype)
    if hardware is not None:
        open_hardware(hardware)
    device_bytes = None if gpu_memory is None else _bytes("--gpu-memory", gpu_memory)
    host_bytes = None if host_memory is None else _bytes("--host-memory", host_memory)
    _dtype("--expert-dtype", expert_dtype)
    _dtype("--dense-dtype", dense_dtype)
    from hybrimoe.errors import ConfigError
    from hybrimoe.extensions.policies import open_policy
    from hybrimoe.machine.calibrate import quick_profile
    from hybrimoe.machine.memory import total_bytes
    from hybrimoe.tracing.study.fitting import KV_DTYPE, Machine, Wish, choose_stored
    from hybrimoe.tracing.study.planning import expect, fit

    open_policy(policy)
    _check_host_copy(host_copy, policy)

    def measured(dtype: str) -> tuple[HardwareProfile, str]:
        checked = _dtype("--expert-dtype", dtype)
        found, said = hardware_for_plan(hardware, lambda: quick_profile(shape.hidden, shape.inter, checked))
        return with_accelerators(found, accelerators, shared_link=False), said

    profile, taken = measured(expert_dtype)
    host_bytes = host_bytes or total_bytes()
    reasons: list[str] = []
    stored = KV_DTYPE if kv_dtype == "auto" else kv_dtype
    if fit_all:
        from hybrimoe.cli.shared.fitting import most_replies, stored_shapes

        wish = Wish(context=context, replies=parallel, most_replies=most_replies())
        on_cpu = not (profile.accel.memory_gib if device_bytes is None else device_bytes)
        shapes = stored_shapes(model, shape, kv_dtype, on_cpu=on_cpu)
        choice = choose_stored(shapes, Machine(profile, device_bytes, host_bytes), wish)
        if choice.expert_dtype != expert_dtype:
            profile, taken = measured(choice.expert_dtype)
        expert_dtype, dense_dtype, found = choice.expert_dtype, choice.dense_dtype, choice.fit
        reasons, stored = list(choice.reasons), choice.kv_dtype
        shape = shapes[stored]
    else:
        found = fit(
            shape, profile, context=context, expert_dtype=expert_dtype, dense_dtype=dense_dtype,
            device_bytes=device_bytes, host_bytes=host_bytes, replies=parallel or 1,
        )  # fmt: skip
    if host_copy == "drop" and not found.device_experts:
        raise ConfigError("--host-copy drop: no expert has a slot on this hardware; leave it out")
    if found.device_bytes and kv_dtype != "auto":
        raise ConfigError("--kv-dtype: keys and values lie on the device, and are stored otherwise on the CPU alone")
    expected = expect(found, shape, profile, policy, expert_dtype, dense_dtype)
    render.note(taken)
    if found.disk_experts and profile.disk is not None:
        from hybrimoe.machine.disks import disk_text

        render.note(f"disk: {disk_text(profile.disk)}")
    for reason in reasons:
        render.note(reason)
    if remark := packing_remark(model, expert_dtype):
        render.note(remark)
    if rope is not None:
        from hybrimoe.checkpoint import rope as positions

        render.note(positions.told(shape.max_context, rope))
    kept = found.host_experts - (min(found.device_experts, found.host_experts) if host_copy == "drop" else 0)
    if as_json:
        dtypes = {"expert_dtype": expert_dtype, "dense_dtype": dense_dtype, "kv_dtype": stored, "reasons": reasons}
        told = {"hardware_taken": taken, "host_experts_after_start": kept, "expected": expected}
        render.emit_json({**asdict(found), **dtypes, **told})
    else:
        _show({**asdict(found), "host_experts_after_start": kept}, expected)


def _bytes(option: str, text: str) -> int:
    from hybrimoe.amounts import parse_amount
    from hybrimoe.errors import ConfigError

    expected = f"{option}: expected a size like 12GiB, found {text!r}"
    try:
        amount = parse_amount(text)
    except ConfigError as error:
        raise ConfigError(expected) from error
    if amount.kind != "bytes":
        raise ConfigError(expected)
    return int(amount.value)


def _dtype(option: str, name: str) -> ExpertDtype:
    """The name of a dtype of packed weights, checked."""
    from hybrimoe.errors import ConfigError, unknown
    from scheduler.machine.profile import BYTES_PER_WEIGHT

    if name not in BYTES_PER_WEIGHT:
        raise ConfigError(f"{option}: {unknown('dtype', name, BYTES_PER_WEIGHT)}")
    return cast("ExpertDtype", name)


def _show(found: dict[str, Any], expected: dict[str, Any]) -> None:
    size = found["expert_bytes"]

    def experts(count: int) -> str:
        return f"{count} of {found['n_experts']} ({count / found['n_experts']:.0%}, {_gib(count * size)})"

    has_device = found["device_bytes"] > 0
    rows = [
        (f"dense weights {'on the device' if has_device else 'in host memory'}", _gib(found["dense_bytes"])),
        (_cached(found), _kv(found)),
        *([("experts in device slots", experts(found["device_experts"]))] if has_device else []),
        *_by_accelerator(found),
        *(_kept_free(found) if has_device else []),
        ("experts in host memory", experts(found["host_experts"])),
        *_after_start(found, experts),
        ("experts outside host memory", experts(found["disk_experts"])),
        (f"longest context{' with a slot a layer' if has_device else ''}", f"{found['max_context']} tokens"),
        *([("expected hit rate (simulated)", f"{expected['hit_rate']:.0%}")] if has_device else []),
        ("expected decode (simulated)", _speed(expected, "decode", 1)),
        (f"expected prefill of {expected['prompt_tokens']} tokens (simulated)", _speed(expected, "prefill", 0)),
    ]
    render.out().print(render.table(f"{found['model']} on {found['hardware']}", ("", ""), rows))


def _cached(found: dict[str, Any]) -> str:
    each = "" if found["replies"] == 1 else f"{found['replies']} replies of "
    return f"KV cache of {each}{found['context']} tokens"


def _speed(expected: dict[str, Any], phase: str, digits: int) -> str:
    """A speed, with the range of public measurements where the machine is known from data sheets only, or that none of
    them is like it."""
    told = f"{expected[f'{phase}_tokens_per_s']:.{digits}f} tokens/s"
    bounds = expected[f"{phase}_tokens_per_s_range"]
    if bounds is None:
        near = "; no public measurement is like it (docs/calibration.md)" if expected["from_data_sheets"] else ""
        return told + near
    return f"{told}; {bounds[0]:.{digits}f} to {bounds[1]:.{digits}f} by public measurements (docs/calibration.md)"


def _by_accelerator(found: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for each of several accelerators."""
    layers, slots = found["layers_by_accelerator"], found["experts_by_accelerator"]
    if len(layers) < 2:
        return []
    return [
        (f"  accelerator {unit}", f"{n_layers} MoE layers, {n_slots} slots")
        for unit, (n_layers, n_slots) in enumerate(zip(layers, slots, strict=True))
    ]


def _check_host_copy(host_copy: str, policy: str) -> None:
    from hybrimoe.errors import ConfigError, unknown
    from hybrimoe.runtime.host_copy import never_moves

    if host_copy not in ("keep", "drop"):
        raise ConfigError(unknown("value of --host-copy", host_copy, ("keep", "drop")))
    if host_copy == "drop" and not never_moves(policy):
        raise ConfigError(
            f"--host-copy drop is for policies that never move an expert, not {policy!r}: --policy static"
        )


def _after_start(found: dict[str, Any], experts: Callable[[int], str]) -> list[tuple[str, str]]:
    """A row where copies of experts in slots are dropped: a start needs them all."""
    kept = found["host_experts_after_start"]
    return [] if kept == found["host_experts"] else [("  once the slots are filled (--host-copy drop)", experts(kept))]


def _kept_free(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What no slot takes of a device's memory, and what all parts of the first one come to."""
    first = found["experts_by_accelerator"][0] * found["expert_bytes"]
    names = ("unpack_bytes", "workspace_bytes", "graph_bytes", "reserve_bytes")
    total = found["dense_bytes"] + found["kv_bytes"] + first + sum(found[name] for name in names)
    return [
        ("kept free: an expert unpacked", _gib(found["unpack_bytes"])),
        ("kept free: workspaces", _gib(found["workspace_bytes"])),
        ("kept free: recorded steps", _gib(found["graph_bytes"])),
        ("kept free: activations", _gib(found["reserve_bytes"])),
        ("all of this on one device", f"{_gib(total)} of {_gib(found['device_bytes'])}"),
    ]


def _kv(found: dict[str, Any]) -> str:
    token_bytes = found["kv_bytes"] / (found["context"] * found["replies"])
    return f"{_gib(found['kv_bytes'])} ({token_bytes / 1024:.1f} KiB a token)"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"
