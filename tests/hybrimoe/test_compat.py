"""Every private interface of transformers works as `hybrimoe.compat` uses it, and is used nowhere else.

A test that fails here names the release that moved the interface.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import import_utils

from hybrimoe import compat

ROOT = Path(__file__).resolve().parents[2]
HERE = f"transformers {transformers.__version__} (tested with {compat.TESTED})"


def tiny() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny()).eval()


def test_an_output_layer_may_be_tied_later() -> None:
    untied = AutoModelForCausalLM.from_config(tiny())
    assert compat.output_tie(untied) == ("lm_head.weight", "model.embed_tokens.weight"), HERE
    compat.tie_output(untied)
    assert untied.config.tie_word_embeddings, HERE
    assert compat.output_tie(untied) is None, HERE
    untied.tie_weights()
    assert untied.lm_head.weight is untied.model.embed_tokens.weight, HERE


def test_generation_settings_and_processors(model: transformers.PreTrainedModel) -> None:
    settings = compat.generation_settings(model, {"do_sample": True, "top_k": 3, "max_new_tokens": 5})
    assert (settings.do_sample, settings.top_k) == (True, 3), HERE
    settings.max_length = 7
    processors = compat.logits_processors(model, settings, 2)
    scores = processors(torch.zeros(1, 2, dtype=torch.long), torch.arange(32.0)[None])
    assert int(torch.isfinite(scores).sum()) == 3, HERE


def test_the_kind_of_cache(model: transformers.PreTrainedModel) -> None:
    assert compat.takes_dynamic_cache(model), HERE


def test_values_that_no_checkpoint_stores() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny())
    compat.compute_missing(empty, set(empty.state_dict()))
    assert not any(tensor.is_meta for tensor in empty.state_dict().values()), HERE
    assert torch.equal(empty.model.norm.weight, torch.ones(16)), HERE


def test_keys_that_a_model_forgives(model: transformers.PreTrainedModel) -> None:
    from transformers.utils.loading_report import LoadStateDictInfo

    report = LoadStateDictInfo(
        missing_keys={"model.norm.weight"}, unexpected_keys={"model.rotary_emb.inv_freq"}, mismatched_keys=set(),
        error_msgs=[], conversion_errors={}, skipped_pp_keys=set(),
    )  # fmt: skip
    compat.forgive_known_keys(model, report)
    assert report.missing_keys == {"model.norm.weight"}, HERE


def test_the_plan_of_dtypes(model: transformers.PreTrainedModel) -> None:
    assert isinstance(compat.dtype_plan(model, torch.bfloat16), dict), HERE


def test_an_interface_that_is_gone_is_named(model: transformers.PreTrainedModel) -> None:
    class Bare:
        pass

    with pytest.raises(compat.CompatibilityError, match=r"has no _get_dtype_plan.*pip install 'transformers=="):
        compat.dtype_plan(Bare(), torch.bfloat16)  # type: ignore[arg-type]


def test_the_names_of_models_are_those_that_transformers_finds_itself() -> None:
    package = Path(transformers.__file__).parent / "models" / "__init__.py"
    define, other = import_utils.define_import_structure, package.parent.parent / "utils"
    assert compat.names_by_module(define)(str(package)) == define(str(package))
    assert compat.names_by_module(define)(other, prefix="utils") == define(other, prefix="utils")


def test_imports_of_another_release_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    before = import_utils.define_import_structure
    with compat.without_what_is_not_needed():
        assert import_utils.define_import_structure is not before
    assert import_utils.define_import_structure is before
    monkeypatch.setattr(compat, "TESTED", "5.0.0")
    with compat.without_what_is_not_needed():
        assert import_utils.define_import_structure is before


def test_private_methods_of_models_are_called_here_only() -> None:
    """`model._name(...)` in product code outside `compat`, `_modules` and the like of torch left out."""
    wrong = []
    for path in sorted((ROOT / "hybrimoe").rglob("*.py")):
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if not isinstance(called, ast.Attribute) or not re.match(r"_[a-z]", called.attr):
                continue
            if re.fullmatch(r"(self\._?)?(model|plain)", ast.unparse(called.value)):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {ast.unparse(called)}")
    assert not wrong, "\n".join(wrong)


def test_nothing_that_transformers_opens_may_run_code_beside_the_weights() -> None:
    """Without `trust_remote_code=False` it asks on the terminal, and runs what a piped "y" allows."""
    wrong, found = [], 0
    for path in sorted((ROOT / "hybrimoe").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", called):
                found += 1
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if said.get("trust_remote_code") != "False":
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")
    assert found > 4
    assert not wrong, "\n".join(wrong)


def test_names_of_models_are_kept_and_read(tmp_path: Path) -> None:
    kept = compat.KeptNames(tmp_path / "made" / "names.json")
    models = Path(transformers.__file__).parent / "models"
    define = import_utils.define_import_structure.__wrapped__  # what it has cached, transformers has added to
    own = define(models, prefix="models")
    assert kept.read() is None
    assert kept.keeping(define)(models, prefix="models") == own
    assert kept.read() == own
    asked: list[Any] = []
    again = compat.KeptNames(kept.file).keeping(lambda *given: asked.append(given))
    assert again(models, prefix="models") == own
    assert not asked
    again(models / "llama")
    assert asked == [(models / "llama", None)]
    kept.file.write_text("[[")
    assert kept.read() is None


def test_kept_names_are_those_of_the_files_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    before = compat.names_file()
    assert before == compat.names_file()
    assert before.parent == tmp_path
    files = compat._files
    monkeypatch.setattr(compat, "_files", lambda folder: [*files(folder), ("another.py", 1, 2)])
    assert compat.names_file() != before
