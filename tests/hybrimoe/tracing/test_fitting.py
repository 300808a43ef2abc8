"""`--fit`: the most precise weights that fit, and why."""

import pytest

from hybrimoe.cli import fitting
from hybrimoe.config.deploy import load_config
from hybrimoe.errors import BudgetError
from hybrimoe.machine.profiles import open_hardware, open_shape
from hybrimoe.tracing.study.fitting import choose

GIB = 1 << 30


def choice_of(host_gib, **more):
    given = {"context": 4096, "device_bytes": None, "host_bytes": round(host_gib * GIB)} | more
    return choose(open_shape("olmoe-1b-7b"), open_hardware("laptop"), **given)


@pytest.mark.parametrize(
    ("host_gib", "dtypes"), [(64, ("bfloat16", "bfloat16")), (12, ("int8", "int8")), (7, ("int4", "int8"))]
)
def test_the_most_precise_weights_that_fit_are_chosen(host_gib, dtypes):
    choice = choice_of(host_gib)
    assert (choice.expert_dtype, choice.dense_dtype) == dtypes
    assert not choice.needs_disk
    assert len(choice.reasons) == {"bfloat16": 1, "int8": 2, "int4": 3}[dtypes[0]]
    assert all("do not fit host memory" in reason for reason in choice.reasons[:-1])
    assert dtypes[0] in choice.reasons[-1]


def test_what_fits_nowhere_else_stays_on_disk_and_what_cannot_run_is_told():
    choice = choice_of(3)
    assert (choice.expert_dtype, choice.needs_disk) == ("int4", True)
    assert "read from disk" in choice.reasons[-1]
    with pytest.raises(BudgetError, match="do not fit"):
        choice_of(64, device_bytes=GIB // 2)


def test_a_deployment_keeps_what_it_sets_itself(monkeypatch):
    monkeypatch.setattr(fitting, "chosen", lambda model: choice_of(3))
    fitted, reasons = fitting.fitted(load_config({}))
    assert (fitted.cpu.expert_dtype, fitted.cpu.dense_dtype, fitted.memory.disk.kind) == ("int4", "int8", "auto")
    assert reasons[-1].startswith("planned: ")
    own = load_config({"cpu": {"expert_dtype": "int8"}, "memory": {"disk": "20GiB"}})
    fitted, _ = fitting.fitted(own)
    assert (fitted.cpu.expert_dtype, fitted.cpu.dense_dtype) == ("int8", "int8")
    assert str(fitted.memory.disk) == "20GiB"
