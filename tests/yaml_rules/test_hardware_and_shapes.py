"""Shipped profiles and shapes load; wrong names and files say what to do."""

import json

import pytest

from hybrimoe.machine.profiles import open_hardware, open_shape
from scheduler.errors import ProfileError
from yaml_rules.errors import YamlRulesError
from yaml_rules.hardware import hardware_names
from yaml_rules.shapes import shape_names

#: Published sizes in 10^9 parameters (model cards; Qwen3.5's says 35, with the part that sees images).
PARAMETERS = {
    "mixtral-8x7b": 46.7, "deepseek-v2-lite": 15.7, "qwen2-57b-a14b": 57.4, "qwen3-30b-a3b": 30.5, "olmoe-1b-7b": 6.9,
    "gpt-oss-20b": 20.9, "deepseek-v3": 671.0, "deepseek-v3.2": 671.9, "qwen3-next-80b-a3b": 80.0,
    "qwen3.5-35b-a3b": 34.7,
}  # fmt: skip


def test_the_five_machines_are_there():
    assert set(hardware_names()) == {"a6000-xeon5220r", "rtx4090-ryzen9", "rtx5090-xeon", "laptop", "h100"}


@pytest.mark.parametrize("name", hardware_names())
def test_hardware_states_its_source(name):
    profile = open_hardware(name)
    assert profile.name == name
    assert profile.provenance == ("fitted" if name.startswith("a6000") else "datasheet")
    assert "Derived" in profile.source
    assert profile.link.gbps < profile.cpu.read_gbps or name.startswith("a6000")


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_shapes_have_the_published_number_of_parameters(name):
    shape = open_shape(name)
    per_layer = shape.n_experts * shape.expert_params + shape.attention_params + shape.shared_params
    dense = shape.n_dense_layers * (shape.dense_params + shape.attention_params)
    total = shape.n_layers * per_layer + dense + 2 * shape.head_params
    assert total / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)


def test_the_width_of_attention_is_that_of_its_heads():
    """Twice the hidden size of Qwen3-30B-A3B; of latent attention keys and values in the mean; 0 where nothing says."""
    widths = {"qwen3-30b-a3b": 32 * 128, "gpt-oss-20b": 64 * 64, "deepseek-v2-lite": 16 * (192 + 128) // 2}
    assert {name: open_shape(name).attention_width for name in widths} == widths
    assert open_shape("olmoe-1b-7b").attention_width == 0


def test_attention_of_models_with_linear_layers_is_their_mean():
    """Of four layers one has gated attention, three have a delta net: their projections by hand."""
    full = 2048 * (16 * 256 * 2 + 2 * 2 * 256 + 16 * 256)
    linear = 2048 * (2 * 16 * 128 + 2 * 32 * 128 + 2 * 32) + 32 * 128 * 2048
    for name in ("qwen3-next-80b-a3b", "qwen3.5-35b-a3b"):
        assert open_shape(name).attention_params == (full + 3 * linear) // 4


def test_every_shipped_shape_is_checked():
    assert set(shape_names()) == set(PARAMETERS)
    assert open_shape("qwen2-57b-a14b").inter == 2560
    assert open_shape("mixtral-8x7b", n_layers=4).n_layers == 4


@pytest.mark.parametrize(
    ("config_class", "shape"),
    [
        ("MixtralConfig", "mixtral-8x7b"),
        ("DeepseekV3Config", "deepseek-v3"),
        ("DeepseekV32Config", "deepseek-v3.2"),
    ],
)
def test_shapes_agree_with_transformers_defaults(tmp_path, config_class, shape):
    """Where the class's defaults are the published model."""
    import transformers

    config = getattr(transformers, config_class)()
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    found, shipped = open_shape(tmp_path), open_shape(shape)
    for name in ("n_layers", "n_experts", "top_k", "hidden", "inter", "attention_params", "kv_bytes"):
        assert getattr(found, name) == getattr(shipped, name), name


def test_shape_from_a_nested_config_and_layer_conventions(tmp_path):
    text = {"num_hidden_layers": 6,
            "hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "num_attention_heads": 2, "vocab_size": 10, "mlp_only_layers": [0], "decoder_sparse_step": 2}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "outer", "text_config": text}))
    assert open_shape(path).n_layers == 3
    path.write_text(json.dumps({**text, "decoder_sparse_step": 1}))
    assert open_shape(path).n_layers == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral-8x7", "did you mean 'mixtral-8x7b'"),
        ("nowhere/config.json", "expected a config.json"),
        ("x.yaml", "no model shape"),
    ],
)
def test_unknown_shapes(name, message):
    with pytest.raises(YamlRulesError, match=message):
        open_shape(name)


@pytest.mark.parametrize(
    ("name", "message"), [("laptob", "did you mean 'laptop'"), ("nowhere.yaml", "no hardware profile at")]
)
def test_unknown_hardware(name, message):
    with pytest.raises(YamlRulesError, match=message):
        open_hardware(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"num_hidden_layers": 2, "hidden_size": 8}', "is a dense model"),
        ('{"num_experts": 4, "hidden_size": 8}', "no positive num_hidden_layers"),
        ("[1]", "expected a JSON object"),
        ("{", "expected the JSON"),
    ],
)
def test_bad_configs(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(YamlRulesError, match=message):
        open_shape(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("link: {gbps: 0}", "link.gbps must be above 0"),
        ("link: {gbps: .nan}", "finite"),
        ("link: {gpbs: 5}", "did you mean 'gbps'"),
        ("link: {gbps: -1}", "above 0"),
    ],
)
def test_bad_profiles(tmp_path, change, message):
    body = "name: x\nprovenance: datasheet\ncpu: {read_gbps: 1, gflops: {int4: 1}}\naccel: {mem_gbps: 1, tflops: 1}\n"
    path = tmp_path / "x.yaml"
    path.write_text(body + change + "\n")
    with pytest.raises(ProfileError, match=message):
        open_hardware(path)
