"""Checkpoints in each quantised format: the same logits as of the same values in plain safetensors, and experts in the
dtype that suits them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, PreTrainedModel

from hybrimoe.checkpoint import load
from hybrimoe.cli.app import app

from ..models import FLOAT32, logits
from .writers import CASES, Case

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
SCALE_ERROR = 2.0**-9  # root mean square: float16 scales rounded to bfloat16 are off by less than 2**-8
LEFT_PLAIN = ("lm_head", "embed_tokens", ".gate.", "norm")  # what quantisers leave out


def quantise(plain: Path, into: Path, case: Case) -> None:
    """The checkpoint `plain` with every linear layer but routers and output quantised, and `plain` with its values."""
    tensors, stored = load_file(plain / "model.safetensors"), dict[str, torch.Tensor]()
    for key, tensor in tensors.items():
        if tensor.dim() != 2 or any(part in key for part in LEFT_PLAIN):
            stored[key] = tensor
            continue
        written = case.write(tensor.float())
        stored |= {key.removesuffix(".weight") + end: part.contiguous() for end, part in written.tensors.items()}
        tensors[key] = written.values
    into.mkdir()
    for folder, weights, more in ((plain, tensors, {}), (into, stored, {"quantization_config": case.config})):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((plain / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | more))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_logits_are_those_of_the_same_values(case: Case, tmp_path: Path, make_model: Any) -> None:
    make_model(MixtralConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    quantise(tmp_path / "plain", tmp_path / "quantised", case)
    whole, found = (load(tmp_path / name, packed_file=False, **FLOAT32) for name in ("plain", "quantised"))
    assert torch.equal(logits(whole), logits(found))
    assert "suits it" in found.hybrimoe.packing


@pytest.mark.parametrize("name", ["gptq-4", "awq", "float8"])
def test_experts_follow_the_file(name: str, tmp_path: Path, make_model: Any) -> None:
    make_model(MixtralConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    quantise(tmp_path / "plain", tmp_path / "quantised", CASES[name])
    options = {option: value for option, value in FLOAT32.items() if option != "expert_dtype"}
    model: PreTrainedModel = load(tmp_path / "quantised", packed_file=False, **options)
    suits = CASES[name].suits
    assert {layer.spec.dtype for layer in model.hybrimoe.session.layer_specs()} == {suits}
    assert f"experts are {suits}, as suits the file ({CASES[name].name})" in model.hybrimoe.explain().remarks[-1]
    plain = load(tmp_path / "plain", packed_file=False, **options)
    assert {layer.spec.dtype for layer in plain.hybrimoe.session.layer_specs()} == {"bfloat16"}
    assert plain.hybrimoe.packing is None


def test_commands_take_a_gptq_checkpoint(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hybrimoe.demo import demo_model_path

    for file in demo_model_path().iterdir():
        if file.is_file() and file.suffix in (".json", ".safetensors", ".jinja"):
            (tmp_path / "plain").mkdir(exist_ok=True)
            (tmp_path / "plain" / file.name).write_bytes(file.read_bytes())
    quantise(tmp_path / "plain", tmp_path / "gptq", CASES["gptq-4"])
    for file in (tmp_path / "plain").iterdir():
        if not (tmp_path / "gptq" / file.name).exists():
            (tmp_path / "gptq" / file.name).write_bytes(file.read_bytes())

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, list(words), catch_exceptions=False, prog_name="hybrimoe")
        assert done.exit_code == 0, done.output
        return done.stdout

    explained = json.loads(run("explain", str(tmp_path / "gptq"), "--json"))
    assert {row["expert_dtype"] for row in explained["rows"]} == {"int4"}
    assert "as suits the file (GPTQ int4, groups of 32, symmetric)" in explained["remarks"][-1]
    inspected = json.loads(run("inspect", str(tmp_path / "gptq"), "--json"))
    assert [total["type_name"] for total in inspected["experts"]] == ["GPTQ int4, groups of 32, symmetric"]
    assert inspected["choice"]["dtype"] == "int4"
    errors = {cost["dtype"]: cost["error"] for cost in inspected["records"]}
    assert errors["int4"] < SCALE_ERROR < errors["int8"]
    same = ("--prompt", "The king", "--max-new-tokens", "8", "--temperature", "0", "--accelerator", "none", "--json")
    texts = [
        json.loads(run("generate", str(tmp_path / name), *same, "--dtype", "int4"))["text"]
        for name in ("gptq", "plain")
    ]
    assert texts[0] == texts[1]
