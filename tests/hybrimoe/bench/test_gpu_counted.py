"""What `benchmarks/gpu_counted.py` counts: instructions, programs at once, what limits a kernel, and the goal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from cpu_kernels import ExpertDtype, ExpertSpec

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_counted", ROOT / "benchmarks" / "gpu_counted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


LISTING = """\
.L_x_1:
        /*0d50*/              @!P1 LDG.E.128 R36, desc[UR14][R60.64+0x2400] ;
        /*0d60*/                   IDP.4A.S8.S8 R3, R4, R5, R3 ;
        /*0d70*/               @P0 FFMA R3, R4, R5, R3 ;
        /*0d80*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0d90*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0da0*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0db0*/                   EXIT ;"""


def test_instructions_are_counted_by_the_unit_that_runs_them(script: Any) -> None:
    from gpu_kernels.triton import ahead

    loop = ahead.loop_of(LISTING.split("\n"))
    assert len(loop) == 6, "from the label to the jump"
    assert script.counts_of(loop) == {"float": 1, "load": 1, "integer": 3, "all": 5}


def test_registers_warps_and_shared_memory_bound_the_programs(script: Any) -> None:
    card = script.Card("card", 90, 10, 1.0, 1000.0, 64, 32, 228, 128)

    def programs(registers: int, shared_bytes: int, warps: int) -> int:
        found: int = script.programs_at_once(card, script.Code({}, {}, registers, shared_bytes, 4), warps)
        return found

    assert programs(128, 0, 8) == 2, "65,536 registers"
    assert programs(130, 0, 8) == 1, "they are given out by 256 a warp"
    assert programs(16, 0, 16) == 4, "64 warps"
    assert programs(16, 100 << 10, 1) == 2, "228 KiB"
    assert programs(16, 0, 1) == 32


@pytest.mark.parametrize(
    ("limit", "n_programs", "turn_bytes", "instructions"),
    [("memory", 1000, 32 << 10, 10), ("loads under way", 4, 4 << 10, 10), ("instructions", 1000, 32 << 10, 100_000)],
)
def test_the_least_rate_is_a_kernels(
    script: Any, limit: str, n_programs: int, turn_bytes: int, instructions: int
) -> None:
    card = script.Card("card", 90, 10, 1.0, 1000.0, 64, 32, 228, 128)
    loop = {"all": instructions, "integer": instructions // 2, "float": 0, "load": 0}
    code = script.Code(loop, dict.fromkeys(loop, 0), 64, 0, 4)
    found = script.kernel(card, code, script.Cut(4), n_programs, 4 * turn_bytes, turn_bytes, 4)
    assert found.limit == limit
    assert found.gbps <= card.gbps
    assert (found.gbps == card.gbps) == (limit == "memory")
    if limit == "loads under way":
        assert found.gbps == pytest.approx(4 * turn_bytes / script.LOAD_US / 1e3)
    if limit == "instructions":
        warps, clocks = -(-n_programs // 10) * 4, 4 * instructions / 4
        assert found.n_bytes / found.gbps == pytest.approx(warps * clocks / card.ghz)


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
def test_loops_of_one_token_reach_the_goal_on_an_h100(script: Any, dtype: ExpertDtype) -> None:
    card = next(card for card in script.CARDS if card.arch == 90)
    kernels = script.counted(card, ExpertSpec(2048, 1024, dtype), 8, 1)
    assert script.loop_share(card, kernels) >= script.GOAL
    assert sum(each.n_bytes for each in kernels) == 8 * ExpertSpec(2048, 1024, dtype).record_bytes


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
def test_one_launch_counts_as_faster_on_a_card_without_overlap(script: Any, dtype: ExpertDtype) -> None:
    """An RTX 4090: the same bytes, by loops that are not slower, in less time; the rounding is no loop over columns."""
    card, spec = next(card for card in script.CARDS if card.arch == 89), ExpertSpec(2048, 768, dtype)
    several = script.counted(card, spec, 8, 1)
    for number in script.singles_on(card, spec):
        found, made = script.counted_in_one(card, spec, 8, number), script.single_code(89, spec, number)
        assert sum(each.n_bytes for each in found) == sum(each.n_bytes for each in several)
        assert all(code.wide_loads >= 4 for code in made)
        assert all(code.once["all"] > 0 for code in made)
    best = min(singles_us(script, card, spec))
    assert best < script.call_us(spec, several)
    assert best > sum(each.n_bytes for each in several) / (card.gbps * 1e3), "no faster than its memory"


def singles_us(script: Any, card: Any, spec: ExpertSpec) -> list[float]:
    numbers = script.singles_on(card, spec)
    return [script.single_us(script.counted_in_one(card, spec, 8, number)) for number in numbers]


@pytest.mark.slow
def test_loops_reach_the_goal_on_every_card_and_calls_are_those_that_were_measured(script: Any) -> None:
    for card in script.CARDS:
        for dtype in script.DTYPES:
            for tokens in (1, 4):
                kernels = script.counted(card, ExpertSpec(2048, 1024, dtype), 8, tokens)
                assert script.loop_share(card, kernels) >= script.GOAL, (card.name, dtype, tokens)
    differences = sorted(abs(us / measured - 1) for _, us, measured in script.agreement())
    assert differences[len(differences) // 2] < 0.2
    assert differences[-1] < 0.4
