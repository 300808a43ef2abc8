"""Models that accelerate has dispatched, that carry PEFT adapters, hooks or patches: right, or refused before anything
is changed. The cases of a package that is not installed are skipped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import hybrimoe
from hybrimoe.errors import ModelError

PLAIN: dict[str, Any] = {"accelerator": "none", "expert_dtype": "float32"}
FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral")
ADAPTER_STD = 0.3
EXPERTS = "model.layers.0.mlp.experts"


def make(family: str = "qwen3_moe") -> PreTrainedModel:
    from tiny_families import tiny_model

    return tiny_model(family)


def logits(model: nn.Module) -> torch.Tensor:
    from tiny_families import prompt

    with torch.no_grad():
        return model(input_ids=prompt(2)).logits


def assert_works(model: PreTrainedModel, target: nn.Module | None = None) -> None:
    """Injecting `target` (the model, or what wraps it) changes no logits, its experts run, and it is restored."""
    target = model if target is None else target
    expected = logits(target)
    with hybrimoe.inject(model, **PLAIN) as injection:
        torch.testing.assert_close(logits(target), expected, rtol=0, atol=1e-4)
        assert injection.stats().total.cpu_experts > 0
    assert torch.equal(logits(target), expected)


def assert_refused(model: nn.Module, message: str) -> None:
    expected = logits(model)
    with pytest.raises(ModelError, match=message):
        hybrimoe.inject(model, **PLAIN)
    assert torch.equal(logits(model), expected)


# accelerate -----------------------------------------------------------------------------------------------------------


def offload(model: PreTrainedModel, how: str, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    if how == "host":
        accelerate.cpu_offload(model, torch.device("cpu"))
    elif how == "disk":
        accelerate.disk_offload(model, folder, torch.device("cpu"))
    else:
        last = [name for name, _ in model.named_children()][-1]
        places = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
        layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
        accelerate.dispatch_model(model, places | layers | {last: "cpu"}, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["host", "disk", "one layer on disk"])
@pytest.mark.filterwarnings("ignore")
def test_offloaded_experts_are_refused_and_work_once_the_hooks_are_gone(how: str, family: str, tmp_path: Path) -> None:
    model = make(family)
    expected = logits(model)
    offload(model, how, tmp_path)
    assert_refused(model, r"accelerate keeps the weights of .*experts elsewhere .*hybrimoe\.load.*remove_hook_from")
    if how == "host":
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), expected)
        assert_works(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_that_only_move_inputs_stay(family: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = make(family)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(io_same_device=True))
    assert_works(model)


# PEFT -----------------------------------------------------------------------------------------------------------------


def adapted(model: PreTrainedModel, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.0, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(ADAPTER_STD * torch.randn(weight.shape, generator=generator))
    return wrapped


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EXPERT_ADAPTERS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    {"target_modules": "all-linear"},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", ["adapter", "injection"])
def test_adapters_of_the_attention_work_and_are_saved(first: str, family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    wrapped = adapted(make(family), **ATTENTION)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "plain")
    if first == "injection":
        model = make(family)
        injection = hybrimoe.inject(model, **PLAIN)
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "plain")
    else:
        injection = hybrimoe.inject(wrapped, **PLAIN)
    torch.testing.assert_close(logits(wrapped), expected, rtol=0, atol=1e-4)
    wrapped.save_pretrained(tmp_path / "injected")
    injection.restore()
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("plain", "injected")]
    assert files[0] == files[1]
    assert torch.equal(logits(wrapped), expected)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_saved_beside_a_loaded_model(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "checkpoint")
    options: dict[str, Any] = {"progress": False, "packed_file": False, "expert_dtype": "int4"}
    model = hybrimoe.load(tmp_path / "checkpoint", accelerator="none", **options)
    adapted(model, **ATTENTION).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", EXPERT_ADAPTERS)
def test_adapters_of_the_experts_have_to_be_merged_first(settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    wrapped = adapted(make(), **copy.deepcopy(settings))
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert_refused(wrapped, r"mlp\.experts carries an adapter .*merge_and_unload")
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    assert_works(merged)

    for attach in (
        lambda model: peft.PeftModel.from_pretrained(model, tmp_path),
        lambda model: model.load_adapter(tmp_path),
        lambda model: adapted(model, **copy.deepcopy(settings)),
    ):
        model = make()
        with hybrimoe.inject(model, **PLAIN), pytest.raises(ModelError, match=r"merged \(merge_and_unload\) before"):
            attach(model)


# Everybody else -------------------------------------------------------------------------------------------------------


def test_a_patched_forward_is_refused() -> None:
    model = make()
    experts = model.get_submodule(EXPERTS)
    inner = experts.forward
    experts.forward = lambda *words: 2 * inner(*words)
    assert_refused(model, "experts has a forward of its own")
    del experts.forward
    assert_works(model)


def test_parametrised_weights_are_refused() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = make()
    parametrize.register_parametrization(model.get_submodule(EXPERTS), "down_proj", Double())
    assert_refused(model, "parametrised weights: make them plain")


def test_hooks_on_the_experts_are_called() -> None:
    model = make()
    seen: list[tuple[str, tuple[int, ...]]] = []
    experts = model.get_submodule(EXPERTS)
    before = experts.register_forward_pre_hook(lambda module, inputs: seen.append(("before", inputs[0].shape)))
    experts.register_forward_hook(lambda module, inputs, out: seen.append(("after", out.shape)))
    logits(model)
    expected = list(seen)
    assert len(expected) == 2
    with hybrimoe.inject(model, **PLAIN):
        seen.clear()
        logits(model)
        assert seen == expected
        before.remove()
        seen.clear()
        logits(model)
        assert seen == expected[1:]
    seen.clear()
    logits(model)
    assert seen == expected[1:], "the hook that was removed while injected stays removed"


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_asking_for_packed_weights_is_refused_with_what_to_do(name: str) -> None:
    model = make()
    with hybrimoe.inject(model, **PLAIN):
        experts = model.get_submodule(EXPERTS)
        assert not hasattr(experts, name)
        with pytest.raises(ModelError, match=rf"{name} is packed .*restore\(\)"):
            getattr(experts, name)
        assert [found for found, _ in experts.named_parameters(recurse=False)] == ["gate_up_proj", "down_proj"]
        assert not list(experts.parameters())


@pytest.mark.parametrize("how", ["hook", "forward", "adapter", "trained"])
def test_linear_layers_that_do_more_than_their_product_are_not_packed(how: str) -> None:
    model = make()
    layer = model.model.layers[0].self_attn
    linear = layer.o_proj
    if how == "hook":
        linear.register_forward_hook(lambda module, inputs, out: 2 * out)
    elif how == "forward":
        linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)
    elif how == "trained":
        model.requires_grad_(False)
        linear.requires_grad_(True)
    else:
        layer.o_proj = Adapter(linear)
    with hybrimoe.inject(model, dense_dtype="int8", **PLAIN):
        assert type(linear) is nn.Linear
        assert linear in list(model.modules())
        assert type(layer.q_proj) is not nn.Linear


class Adapter(nn.Module):
    """As PEFT's layers: what it adapts is called `base_layer`."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.base_layer(x)
