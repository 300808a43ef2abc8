"""The experiments of the HybriMoE paper (arXiv 2504.05897), and every policy on every trace and profile, as cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hybrimoe.bench.ablation.sweep import SYNTHETIC, Case
from scheduler.demand import Phase
from scheduler.lossy import LOSSY_POLICIES

PAPER_HARDWARE = "a6000-xeon5220r"
PAPER_SHAPES = ("mixtral-8x7b", "deepseek-v2-lite", "qwen2-57b-a14b")
PAPER_RATIOS = (0.25, 0.5, 0.75)
PAPER_PREFILLS = (32, 128, 512, 1024)

#: Table III (Qwen2-57B-A14B, 25 % cached): label -> (policy, prefill s, decode s). None: the paper gives no figure.
#: The balance is that of the published code, which its figures come from; rows without figures show the text's.
TABLE_3: dict[str, tuple[str, float | None, float | None]] = {
    "baseline": ("static", 1.47, 0.21),
    "+ scheduling": ("hybrimoe_released/none/fixed", 1.17, 0.14),
    "+ prefetching": ("static/impact/fixed", 1.39, 0.18),
    "+ caching": ("static/misses/mrs", None, 0.15),
    "all": ("hybrimoe_released", 1.13, 0.11),
    "+ scheduling, text": ("hybrimoe/none/fixed", None, None),
    "all, text": ("hybrimoe", None, None),
    "ours": ("ours", None, None),
}
#: What Table III is sensitive to: label -> (changes of the profile, policies that take another's place).
SENSITIVITY: dict[str, tuple[str, dict[str, str]]] = {
    "as assumed": ("", {}),
    "link 5 GB/s": ("link.gbps=5", {}),
    "link 7 GB/s": ("link.gbps=7", {}),
    "link 8 GB/s": ("link.gbps=8", {}),
    "CPU reads 10 % less": ("cpu.read_gbps=12.9", {}),
    "CPU reads 10 % more": ("cpu.read_gbps=15.7", {}),
    "handover 500 us a layer": ("dense.sync_us=500", {}),
    "handover 700 us a layer": ("dense.sync_us=700", {}),
    "the text's balance": ("", {"+ scheduling": "hybrimoe/none/fixed", "all": "hybrimoe"}),
    "scheduling keeps what it brought (LRU)": ("", {"+ scheduling": "hybrimoe_released/none/lru"}),
    "4 visitors a layer": ("", {"+ prefetching": "static/impact/fixed:visitors=4"}),
    "prefetched experts join the set (LRU)": ("", {"+ prefetching": "static/impact/lru"}),
}
TABLE_3_SHAPE, TABLE_3_RATIO, TABLE_3_PREFILL = "qwen2-57b-a14b", 0.25, 128
#: The paper's average speed-up over KTransformers' static mapping.
PAPER_SPEEDUP: dict[Phase, float] = {"prefill": 1.33, "decode": 1.70}
#: Hit rates at 25 % (LRU, MRS).
PAPER_HITS = {"mixtral-8x7b": (0.302, 0.362), "deepseek-v2-lite": (0.477, 0.527), "qwen2-57b-a14b": (0.450, 0.528)}

HEADLINE = ("static", "hybrimoe", "hybrimoe_released", "ours")
EVERY_POLICY = ("static", "llama_cpp", "moe_infinity", "fiddler", "freetoken", "adapmoe", "hobbit", "fate", "hybrimoe",
                "hybrimoe_released", "ours", "oracle")  # fmt: skip
EVERY_HARDWARE = ("a6000-xeon5220r", "rtx4090-ryzen9", "rtx5090-xeon", "laptop", "h100")
LOSSY_SHAPE = "qwen3-30b-a3b"
LOSSY_HARDWARE = ("a6000-xeon5220r", "rtx4090-ryzen9", "laptop")


def table_3(decode_tokens: int) -> list[Case]:
    """The paper's steps, each one alone on the baseline (prefetching alone is slower there than scheduling alone).

    Assumed, where the paper is silent: the baseline does not know which experts are used most, it hits the share that
    is cached. Prefetched experts alone serve the layer that they were brought for and do not join the static set (else
    they would be a cache); caching alone lets the CPU compute the misses and brings them behind it; gates ahead have
    the recall of ``trace_predict.NOISY_RECALL``.
    """
    return [
        _step_of_table_3("table3", label, policy, phase, decode_tokens)
        for label, (policy, _, _) in TABLE_3.items()
        for phase in ("prefill", "decode")
    ]


def sensitivity(decode_tokens: int) -> list[Case]:
    """Table III's rows that the paper gives figures for, with one assumption changed at a time."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    return [
        replace(_step_of_table_3("sensitivity", label, others.get(label, policy), phase, decode_tokens),
                changes=changes, variant=variant)
        for variant, (changes, others) in SENSITIVITY.items()
        for label, (policy, *figures) in TABLE_3.items()
        for phase, figure in zip(phases, figures, strict=True)
        if figure is not None
    ]  # fmt: skip


def _step_of_table_3(experiment: str, label: str, policy: str, phase: Phase, decode_tokens: int) -> Case:
    return Case(experiment, policy, PAPER_HARDWARE, TABLE_3_SHAPE, SYNTHETIC, TABLE_3_RATIO, phase, TABLE_3_PREFILL,
                decode_tokens, 2, informed=False, label=label, dense_dtype="int4", predictions="noisy")  # fmt: skip


def speedups(decode_tokens: int, prefills: Sequence[int] = PAPER_PREFILLS) -> list[Case]:
    """Prefill of each length and decode at each share, for the paper's three models, with and without a profile."""
    cases = []
    for shape in PAPER_SHAPES:
        for ratio in PAPER_RATIOS:
            for policy in HEADLINE:
                cases += [_paper("decode", policy, shape, ratio, 32, decode_tokens)]
                cases += [_paper("prefill", policy, shape, ratio, length, 1) for length in prefills]
    return cases


def _paper(phase: Phase, policy: str, shape: str, ratio: float, n_prefill: int, n_decode: int) -> Case:
    return Case("paper", policy, PAPER_HARDWARE, shape, SYNTHETIC, ratio, phase, n_prefill, n_decode, 2, informed=False,
                dense_dtype="int4")  # fmt: skip


def every_policy(
    traces: Sequence[tuple[str, str]], decode_tokens: int, ratios: Sequence[float], policies: Sequence[str] = (),
    machines: Sequence[str] = EVERY_HARDWARE,
) -> list[Case]:  # fmt: skip
    """Each preset, and the given policies, on each (trace, shape) and machine, decode; the warm-up knows the profile of
    other sequences."""
    return [
        Case("policies", policy, hardware, shape, trace, ratio, "decode", 32, decode_tokens, 2)
        for trace, shape in traces
        for hardware in machines
        for ratio in ratios
        for policy in dict.fromkeys((*EVERY_POLICY, *policies))
    ]


def lossy(decode_tokens: int) -> list[Case]:
    """Every lossy policy at its defaults beside ours and static, 25 % cached, decode; the lossless run in its dtype.

    Experts are bfloat16, and int4 for policies that need bit planes.
    """
    kinds = {
        dtype: ["", *sorted(name for name, made in LOSSY_POLICIES.items() if made.uses_planes == (dtype == "int4"))]
        for dtype in ("bfloat16", "int4")
    }
    return [
        Case("lossy", policy, hardware, LOSSY_SHAPE, SYNTHETIC, 0.25, "decode", 32, decode_tokens, 2,
             label=kind or "lossless", expert_dtype=dtype, lossy=kind)
        for hardware in LOSSY_HARDWARE
        for policy in ("static", "ours")
        for dtype in kinds
        for kind in kinds[dtype]
    ]  # fmt: skip


def hit_rates(decode_tokens: int) -> list[Case]:
    """LRU against MRS where every miss is brought in, at 25 %."""
    return [
        Case("hits", f"on_demand/none/{cache}", PAPER_HARDWARE, shape, SYNTHETIC, 0.25, "decode", 32, decode_tokens, 2,
             informed=False, label=cache, dense_dtype="int4")
        for shape in PAPER_SHAPES
        for cache in ("lru", "mrs")
    ]  # fmt: skip
