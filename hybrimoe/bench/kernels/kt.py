"""kt-kernel (KTransformers) for `bench kernels`: its int4 experts with groups of 32 columns ("RAWINT4") and bfloat16.

kt-kernel pins a torch of its own (0.7.2: 2.9.1), so it belongs into an environment of its own; its extension does
not link torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from hybrimoe.bench.kernels.setting import Call, Setting
from hybrimoe.errors import HybriMoEError

GROUP = 32
MAX_TOKENS = 1024  # of a call
CLASSES = {"int4": ("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"), "bfloat16": ("AMXBF16_MOE", "AVX2BF16_MOE")}
"""By preference; the AMX ones have AVX-512 paths in the builds for CPUs without AMX."""


def make_layers(setting: Setting, dtype: str) -> Callable[[int], Call]:
    """Experts of all sets in one layer object; a call runs those of one set."""
    bits = {"int4": 4.5, "bfloat16": 16.0}[dtype]
    n_experts = setting.shape.k * setting.n_sets(bits)
    pool = _pool()
    on_accelerator = torch.zeros(n_experts, dtype=torch.bool)  # none; the layer keeps its address
    moe = _layer(setting, dtype, on_accelerator, pool)

    def for_tokens(n_tokens: int) -> Call:
        if n_tokens > MAX_TOKENS:
            raise HybriMoEError(f"kt-kernel is prepared for {MAX_TOKENS} tokens a call, found {n_tokens}")
        k = setting.shape.k
        x = setting.x(n_tokens).bfloat16().contiguous()
        out = torch.empty_like(x)
        ids = [torch.arange(s, s + k).repeat(n_tokens, 1).contiguous() for s in range(0, n_experts, k)]
        weights = torch.full((n_tokens, k), 1 / k)
        size = torch.tensor([n_tokens], dtype=torch.int32)

        def call(number: int) -> np.ndarray:
            chosen = ids[number % len(ids)]
            addresses = [t.data_ptr() for t in (chosen, weights, x, out)]
            pool.submit(moe.forward_task(size.data_ptr(), k, *addresses, False))
            pool.sync()
            assert on_accelerator.numel() == n_experts  # the closure keeps it
            result: np.ndarray = out.float().numpy()
            return result

        return call

    return for_tokens


@cache
def _pool() -> Any:
    """The one thread pool: a thread fewer than torch has, because the thread that waits for it spins, as idle ones do.

    With one more, two spin on one core (measured on 2 cores, one token of int4: 8.0 ms, and 3.3 so).
    """
    from kt_kernel import kt_kernel_ext as extension

    config = extension.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map = 1, [0]
    config.subpool_thread_count = [max(1, torch.get_num_threads() - 1)]
    return extension.CPUInfer(config)


def _layer(setting: Setting, dtype: str, on_accelerator: torch.Tensor, pool: Any) -> Any:
    from kt_kernel import kt_kernel_ext as extension

    shape, n_experts = setting.shape, len(on_accelerator)
    config = extension.moe.MOEConfig(n_experts, shape.k, shape.hidden, shape.inter, on_accelerator.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, pool.backend_, MAX_TOKENS
    kept = []
    for name, weight in (("gate", setting.gate), ("up", setting.up), ("down", setting.down)):
        codes, scales = codes_and_scales(weight) if dtype == "int4" else (weight.bfloat16().contiguous(), None)
        kept += [codes, scales]
        setattr(config, f"{name}_projs", [[codes.data_ptr()] * n_experts])
        setattr(config, f"{name}_scales", [[0 if scales is None else scales.data_ptr()] * n_experts])
    if dtype == "int4":
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, GROUP, False
    kind = next(getattr(extension.moe, name) for name in CLASSES[dtype] if hasattr(extension.moe, name))
    moe = kind(config)
    order = torch.arange(n_experts)
    pool.submit(moe.load_weights_task(order.data_ptr()))
    pool.sync()
    assert kept  # were read by the load
    return moe


def codes_and_scales(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, K / 2], the even column in the low half, q + 8; bfloat16 scales [N, K / 32], extreme value / -8."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scales = (groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2) / -8).bfloat16()
    codes = ((groups / scales.float().unsqueeze(2)).round().clamp(-8, 7) + 8).to(torch.uint8).view(weight.shape)
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous(), scales.contiguous()
