"""`--fit`: the most precise weights that fit, then keys and values, context and replies; and why."""

from dataclasses import replace

import pytest

from hybrimoe.cli.shared import fitting
from hybrimoe.config.deploy import load_config
from hybrimoe.errors import BudgetError, ConfigError
from hybrimoe.machine.profiles import open_hardware, open_shape
from hybrimoe.runtime.startup.budget import DEVICE_RESERVE_BYTES
from hybrimoe.tracing.study.fitting import Machine, Wish, choose, choose_stored
from hybrimoe.tracing.study.planning import HOST_RESERVE_BYTES, token_bytes

GIB = 1 << 30
WISH = Wish(context=4096)


def choice_of(host_gib, wish=WISH, *, device_bytes=None, model="olmoe-1b-7b", hardware="laptop"):
    machine = Machine(open_hardware(hardware), device_bytes, round(host_gib * GIB))
    return choose(open_shape(model), machine, wish)


@pytest.mark.parametrize(
    ("host_gib", "dtypes"), [(64, ("bfloat16", "bfloat16")), (12, ("int8", "int8")), (7, ("int4", "int8"))]
)
def test_the_most_precise_weights_that_fit_are_chosen(host_gib, dtypes):
    choice = choice_of(host_gib)
    assert (choice.expert_dtype, choice.dense_dtype) == dtypes
    assert not choice.needs_disk
    *tried, cache, slots = choice.reasons
    assert len(tried) == {"bfloat16": 1, "int8": 2, "int4": 3}[dtypes[0]]
    assert all("do not fit host memory" in reason for reason in tried[:-1])
    assert f"all 1024 experts ({1024 * choice.fit.expert_bytes / GIB:.1f} GiB) fit" in tried[-1]
    assert tried[-1].startswith(f"{dtypes[0]} experts with {dtypes[1]} dense weights")
    assert cache.startswith("keys and values in bfloat16: ")
    assert "one reply of 4096 tokens" in cache
    assert slots.startswith(f"about {choice.fit.device_experts} slots")


def test_what_fits_nowhere_else_stays_on_disk_and_what_cannot_run_is_told():
    choice = choice_of(3)
    assert (choice.expert_dtype, choice.needs_disk) == ("int4", True)
    assert any("read from disk" in reason for reason in choice.reasons)
    with pytest.raises(BudgetError, match=r"nothing fits.*needs .* GiB of host memory"):
        choice_of(64, device_bytes=GIB // 2)


@pytest.mark.parametrize("host_gib", [10, 12, 20, 64, 200])
@pytest.mark.parametrize("most", [1, 4])
def test_without_a_device_what_is_chosen_fits_host_memory_together(host_gib, most):
    choice = choice_of(host_gib, Wish(most_replies=most), device_bytes=0)
    found = choice.fit
    used = found.dense_bytes + choice.kv_bytes + found.host_experts * found.expert_bytes
    assert used + HOST_RESERVE_BYTES <= found.host_bytes
    assert found.host_experts == found.n_experts
    assert choice.kv_bytes >= found.kv_bytes > 0
    assert 1 <= found.replies <= most
    assert found.context <= 4096, "the model's own limit"
    assert "no slots" in choice.reasons[-1]


def test_more_memory_is_more_replies_before_it_is_a_longer_context():
    wish = Wish(most_replies=4)
    few, many = (choice_of(gib, wish, device_bytes=0, model="qwen3-30b-a3b").fit for gib in (19.5, 200))
    assert few.replies <= many.replies == 4
    assert few.context * few.replies < many.context * many.replies


def test_slots_keep_most_of_a_device_that_has_no_room_for_all_experts():
    choice = choice_of(64, Wish(most_replies=4), device_bytes=6 * GIB, model="qwen3-30b-a3b")
    found = choice.fit
    assert 0 < found.device_experts < found.n_experts
    held = found.dense_bytes + choice.kv_bytes + found.device_experts * found.expert_bytes
    assert held + DEVICE_RESERVE_BYTES <= 6 * GIB + choice.kv_bytes // 8, "the room in which caches grow comes on top"
    assert found.device_experts * found.expert_bytes > choice.kv_bytes


def test_what_is_wished_is_kept():
    choice = choice_of(64, Wish(context=1000, replies=3, expert_dtype="int8", dense_dtype="bfloat16"), device_bytes=0)
    assert (choice.expert_dtype, choice.dense_dtype) == ("int8", "bfloat16")
    assert (choice.fit.context, choice.fit.replies) == (1000, 3)
    given = choice_of(64, Wish(kv_bytes=GIB, most_replies=4), device_bytes=0)
    assert given.kv_bytes == GIB
    assert 0 < given.fit.kv_bytes <= GIB
    with pytest.raises(ConfigError, match="beyond"):
        choice_of(64, replace(WISH, context=10**6))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish(context=32768, replies=64), "The nearest that fits: .* one reply of [0-9]+ tokens"),
        (Wish(replies=1, expert_dtype="float32", dense_dtype="float32"), "fits with other dtypes: .* tokens"),
    ],
)
def test_a_refusal_names_the_nearest_that_fits(wish, said):
    with pytest.raises(BudgetError, match=said):
        choice_of(64, wish, device_bytes=3 * GIB, model="qwen3-30b-a3b")


def test_keys_and_values_take_fewer_bits_only_where_nothing_fits_else():
    shape = open_shape("olmoe-1b-7b")
    shapes = fitting.stored_shapes("olmoe-1b-7b", shape, "auto", on_cpu=True)
    assert list(shapes) == ["bfloat16", "int8", "int4"]
    assert [shapes[name].kv_bytes for name in shapes] == sorted((one.kv_bytes for one in shapes.values()), reverse=True)
    assert list(fitting.stored_shapes("olmoe-1b-7b", shape, "auto", on_cpu=False)) == ["bfloat16"]
    assert list(fitting.stored_shapes("olmoe-1b-7b", shape, "int4", on_cpu=True)) == ["int4"]
    diskless = replace(open_hardware("laptop"), disk=None)
    least = choice_of(64, Wish(context=1, expert_dtype="int4", dense_dtype="int8"), device_bytes=0).fit
    weights = least.dense_bytes + least.n_experts * least.expert_bytes + HOST_RESERVE_BYTES
    roomy, tight = (
        choose_stored(shapes, Machine(diskless, 0, weights + kv), Wish(context=4096))
        for kv in (4096 * token_bytes(shape), 4096 * token_bytes(shapes["int8"]))
    )
    assert (roomy.kv_dtype, tight.kv_dtype) == ("bfloat16", "int8")
    assert "with keys and values in bfloat16 nothing fits" in tight.reasons[-1]
    with pytest.raises(BudgetError, match="nothing fits"):
        choose_stored(shapes, Machine(diskless, 0, weights // 2), Wish(context=4096))


def test_a_deployment_keeps_what_it_sets_itself(monkeypatch):
    seen = []

    def chosen(deployment, wish):
        seen.append(wish)
        return choice_of(3, wish, device_bytes=2 * GIB)

    monkeypatch.setattr(fitting, "chosen", chosen)
    fitted = fitting.fitted(load_config({}), serves=True)
    assert (fitted.cpu.expert_dtype, fitted.cpu.dense_dtype, fitted.memory.disk.kind) == ("int4", "int8", "auto")
    assert fitted.memory.kv.kind == "bytes"
    assert isinstance(fitted.server.parallel, int)
    own = load_config(
        {
            "cpu": {"expert_dtype": "int8"},
            "memory": {"disk": "20GiB", "kv": "64MiB"},
            "server": {"parallel": 2},
        }
    )
    fitted = fitting.fitted(own, serves=True)
    assert (seen[-1].expert_dtype, seen[-1].kv_bytes, seen[-1].replies) == ("int8", 64 << 20, 2)
    assert (fitted.cpu.expert_dtype, fitted.cpu.dense_dtype) == ("int8", "int8")
    assert (str(fitted.memory.disk), str(fitted.memory.kv), fitted.server.parallel) == ("20GiB", "64MiB", 2)
    fitting.fitted(own, told=False)
    assert seen[-1].replies is None, "chat and generate answer one at a time"
    assert seen[-1].most_replies == 1
