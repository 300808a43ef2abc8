"""Plans: a spec in the form that the compiled workers read."""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.engine import call
from cpu_kernels.engine.workers import DOWN_WORK, PREPARE_WORK, UP_WORK
from cpu_kernels.format.layout import BLOCK_COLUMNS, block_bytes, padded
from cpu_kernels.format.spec import Activation, ExpertDtype, ExpertSpec
from cpu_kernels.host.isa import BY_NAME
from cpu_kernels.simd.compile import kernel_address
from cpu_kernels.simd.formats import format_of
from cpu_kernels.simd.rows import (
    ACT_MAX,
    ALPHA,
    GATE_MAX,
    N_PARAMETERS,
    UP_LIMIT,
    UP_OFFSET,
    FinishKernel,
    PrepareKernel,
)
from cpu_kernels.simd.tiles import PanelKernel


@dataclass(frozen=True, slots=True)
class Plan:
    """What the drivers need to know about a spec."""

    vector: np.ndarray  # int64 [call.PLAN_SIZE]
    parameters: np.ndarray  # float32 [N_PARAMETERS] of the activation
    x_row_bytes: int
    h_row_bytes: int


def expert_plan(spec: ExpertSpec, isa_name: str) -> Plan:
    """The plan of an expert; compiles (or loads) the kernels it names."""
    layout = spec.layout
    vector = _base(spec.dtype, isa_name, spec.hidden, spec.inter, spec.hidden)
    vector[call.GATED] = spec.activation.gated
    finish = FinishKernel(format_of(spec.dtype, BY_NAME[isa_name]), spec.activation.kind, spec.activation.gated)
    vector[call.FINISH] = kernel_address(finish, isa_name)
    vector[call.DOWN], vector[call.HAS_BIAS] = layout.down_offset, spec.has_bias
    vector[call.GATE_BIAS], vector[call.UP_BIAS] = layout.gate_bias_offset, layout.up_bias_offset
    vector[call.DOWN_BIAS], vector[call.UP_WORKER] = layout.down_bias_offset, UP_WORK.address
    return _plan(vector, spec.activation)


def linear_plan(in_features: int, out_features: int, dtype: ExpertDtype, isa_name: str) -> Plan:
    """The plan of one packed matrix."""
    return _plan(_base(dtype, isa_name, in_features, in_features, out_features), Activation("identity", gated=False))


def _base(dtype: ExpertDtype, isa_name: str, n_in: int, n_inter: int, n_out: int) -> np.ndarray:
    vector = np.zeros(call.PLAN_SIZE, np.int64)
    form = format_of(dtype, BY_NAME[isa_name])
    vector[call.PANEL] = kernel_address(PanelKernel(dtype), isa_name)
    vector[call.EXACT_PANEL] = kernel_address(PanelKernel(dtype, pairs=form.holds_bf16), isa_name)
    vector[call.PREPARE] = kernel_address(PrepareKernel(form), isa_name)
    vector[[call.IN_TRUE, call.INTER_TRUE, call.OUT_TRUE]] = n_in, n_inter, n_out
    vector[[call.IN, call.INTER, call.OUT]] = padded(n_in), padded(n_inter), padded(n_out)
    vector[call.BLOCK_BYTES], vector[call.X_BYTES] = block_bytes(dtype), form.block_bytes
    vector[call.PREPARE_WORKER], vector[call.DOWN_WORKER] = PREPARE_WORK.address, DOWN_WORK.address
    return vector


def _plan(vector: np.ndarray, activation: Activation) -> Plan:
    block = int(vector[call.X_BYTES])
    rows = [int(vector[size]) // BLOCK_COLUMNS * block for size in (call.IN, call.INTER)]
    return Plan(vector, activation_parameters(activation), *rows)


def activation_parameters(activation: Activation) -> np.ndarray:
    """float32 [N_PARAMETERS] that `finish` reads; limits that are not set are infinite."""
    values = np.zeros(N_PARAMETERS, np.float32)
    values[ALPHA] = activation.alpha
    values[GATE_MAX] = np.inf if activation.gate_max is None else activation.gate_max
    values[ACT_MAX] = np.inf if activation.act_max is None else activation.act_max
    values[UP_LIMIT] = np.inf if activation.up_limit is None else activation.up_limit
    values[UP_OFFSET] = activation.up_offset
    return values
