"""The dtype of experts that follows from how their file has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cpu_kernels import ExpertDtype
from hybrimoe.checkpoint.choice import choose_expert_dtype
from hybrimoe.checkpoint.formats.source import storage_of_groups
from hybrimoe.checkpoint.stored import Storage


def layers(*storages: Storage) -> list[Any]:
    return [SimpleNamespace(storages=lambda storage=storage: {storage}) for storage in storages]


def symmetric(bits: int, group: int = 32) -> Storage:
    return storage_of_groups(f"int{bits}", bits, 128, 128 // group, symmetric=True, ordered=False)


@pytest.mark.parametrize(
    ("bits", "dtype", "remark"),
    [
        ((3,), "int3", "codes stay"),
        ((2, 4), "int4", "codes stay"),
        ((3, 6, 5), "int6", "codes stay"),
        ((4, 8), "int8", "rounded again"),
    ],
)
def test_layers_of_several_widths_take_records_that_keep_the_codes_of_all(
    bits: tuple[int, ...], dtype: str, remark: str
) -> None:
    choice = choose_expert_dtype(None, layers(*map(symmetric, bits)))
    assert choice.dtype == dtype
    assert choice.remark is not None
    assert remark in choice.remark
    assert ("rounded again" in choice.remark) == (dtype == "int8")


def test_groups_that_do_not_fit_records_and_layers_that_are_not_quantised_are_int8() -> None:
    assert choose_expert_dtype(None, layers(symmetric(3), symmetric(3, group=16))).dtype == "int8"
    assert choose_expert_dtype(None, layers(symmetric(3), Storage("BF16"))).dtype == "int8"
    assert choose_expert_dtype(None, layers(Storage("BF16"))).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int3"])
def test_packed_experts_stay_what_they_are(dtype: ExpertDtype) -> None:
    packed = Storage("a packed file", dtype, "they are packed already")
    assert choose_expert_dtype(None, layers(packed)).dtype == dtype
    assert choose_expert_dtype(None, layers(packed, symmetric(4))).dtype == ("int4" if dtype == "int3" else "int8")


def test_what_somebody_says_is_taken_and_compared() -> None:
    choice = choose_expert_dtype("int4", layers(symmetric(6)))
    assert (choice.dtype, choice.remark) == (
        "int4",
        "the file has its experts as int6, groups of 32, symmetric; they are packed as int4: int6 suits it; `hybrimoe"
        " inspect` measures what each dtype adds",
    )
