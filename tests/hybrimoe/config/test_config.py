"""Deployment files: what is read, what is refused, and that a refusal names file, line and the right name."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe.amounts import Amount, parse_amount
from hybrimoe.config.deploy import DeployConfig, default_preset, json_schema, load_config
from hybrimoe.config.runtime import choose_accelerators, runtime_config
from hybrimoe.config.scheduler import resolved_policy
from hybrimoe.errors import BudgetError, ConfigError, DeviceError
from hybrimoe.runtime.startup.backends import open_devices
from yaml_rules import shipped

GIB = 2**30

DESIGN_EXAMPLE = """\
model: /models/Qwen3-30B-A3B     # directory or hub id; omitted = the demo model
rules: auto                      # shipped name, file, or inline list
accelerator: auto                # cuda:0 | xpu:0 | emulated | none | auto, or a list
memory: {gpu_experts: auto, host: auto, disk: none, kv: auto}
cpu: {backend: auto, threads: auto, expert_dtype: int4, dense_dtype: int8}
scheduler: {policy: ours, lookahead: 3}
server: {host: 127.0.0.1, port: 8000}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "deploy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_design_example_is_read(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DESIGN_EXAMPLE))
    assert config.model == "/models/Qwen3-30B-A3B"
    assert config.accelerator == ("auto",)
    assert config.memory.gpu_experts == Amount("auto")
    assert config.memory.disk == Amount("none")
    assert (config.cpu.expert_dtype, config.cpu.dense_dtype) == ("int4", "int8")
    assert (resolved_policy(config.scheduler)[0], config.scheduler.lookahead) == ("ours", 3)
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize("preset", shipped.names("deploy"))
def test_every_shipped_preset_is_valid_commented_and_survives_a_round_trip(preset: str) -> None:
    config = load_config(preset)
    assert load_config(config.as_dict()) == config
    assert shipped.path_of("deploy", preset).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("key", ["server.port", "server.queue_length", "scheduler.lookahead", "cpu.threads"])
def test_true_is_no_number(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=rf"deploy.yaml:1: {key}: expected a number.*found True"):
        load_config(write(tmp_path, f"{section}: {{{name}: true}}\n"))


def test_environment_variables_in_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules.yaml").write_text("[]", encoding="utf-8")
    monkeypatch.setenv("MODELS", str(tmp_path))
    monkeypatch.delenv("NOT_SET", raising=False)
    config = load_config(write(tmp_path, "model: $MODELS/qwen\nrules: ${MODELS}/rules.yaml\n"))
    assert (config.model, config.rules) == (f"{tmp_path}/qwen", f"{tmp_path}/rules.yaml")
    with pytest.raises(ConfigError, match=r"deploy.yaml:1: model: the environment variable \$NOT_SET is not set"):
        load_config(write(tmp_path, "model: $NOT_SET/qwen\n"))
    (tmp_path / "$NOT_SET").mkdir()
    assert load_config(write(tmp_path, f"model: {tmp_path}/$NOT_SET\n")).model == f"{tmp_path}/$NOT_SET"


def test_the_seed_that_no_policy_ever_drew_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed"):
        load_config({"scheduler": {"seed": 3}})


def test_default_presets() -> None:
    assert default_preset() == "demo"
    assert default_preset("/models/x") == "default"
    assert load_config().source.endswith("demo.yaml")
    assert load_config(model="/models/x").source.endswith("default.yaml")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("auto", Amount("auto")),
        ("none", Amount("none")),
        (None, Amount("none")),
        (0, Amount("count", 0)),
        (64, Amount("count", 64)),
        ("64", Amount("count", 64)),
        (0.25, Amount("share", 0.25)),
        ("0.25", Amount("share", 0.25)),
        ("25%", Amount("share", 0.25)),
        (1.0, Amount("share", 1.0)),
        (0.0, Amount("none")),
        ("6GiB", Amount("bytes", 6 * GIB)),
        ("6 gib", Amount("bytes", 6 * GIB)),
        ("6GB", Amount("bytes", 6 * 10**9)),
        ("1.5MiB", Amount("bytes", 3 * 2**19)),
        ("512B", Amount("bytes", 512)),
        ("0GiB", Amount("none")),
    ],
)
def test_amounts(written: object, expected: Amount) -> None:
    amount = parse_amount(written)
    assert amount == expected
    assert parse_amount(str(amount)) == expected


@pytest.mark.parametrize(
    "written", [-1, 1.5, -0.5, "120%", "6GX", "-2GiB", "sixty", "", True, [1], float("nan"), "inf", "1e400GiB"]
)
def test_bad_amounts_say_what_was_found(written: object) -> None:
    with pytest.raises(ConfigError):
        parse_amount(written)


def test_amounts_as_experts() -> None:
    def experts(written: object) -> int:
        return parse_amount(written).to_experts(total_experts=64, expert_bytes=1000, auto=10)

    assert [experts(x) for x in ("auto", "none", 0, 64, 0.25, 1.0, 0.001, "5KB", "5.9KB", "1TiB")] == [
        10, 0, 0, 64, 16, 64, 1, 5, 5, 64,
    ]  # fmt: skip
    with pytest.raises(BudgetError, match=r"65 expert slots.* 64 experts"):
        experts(65)
    with pytest.raises(BudgetError, match="999B holds no expert"):
        experts("999B")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("rules: auto\nmemory:\n  gpu_expert: auto\n", 3, "unknown key 'memory.gpu_expert'; did you mean 'gpu_ex"),
        ("modle: x\n", 1, "unknown key 'modle'; did you mean 'model'"),
        ("rules: auto\ncpu: {expert_dtype: int7}\n", 2, "cpu.expert_dtype: .*'int4'.*found 'int7'"),
        ("cpu:\n  threads: 0\n", 2, "cpu.threads: expected a number of threads"),
        ("accelerator: cuda0\n", 1, "'cuda0' is no accelerator; .*did you mean 'cuda:0'"),
        ("accelerator: []\n", 1, "accelerator: expected a device"),
        ("accelerator: [cuda:0, cuda]\n", 1, "accelerator: cuda:0 stands twice in the list"),
        ("accelerator: [emulated, auto]\n", 1, r"accelerator: auto can only stand first.*\[cuda:0, cuda:1\]"),
        ("accelerator: [emulated, none]\n", 1, "accelerator: none cannot stand beside"),
        ("accelerator: [auto, none, emulated]\n", 1, "accelerator: none cannot stand beside"),
        ("memory:\n  kv: 12\n", 2, "memory.kv: .*expected auto or bytes or share"),
        ("memory:\n  gpu_experts: 1.5\n", 2, "a share must be above 0 and at most 1, found 1.5"),
        ("memory: 3\n", 1, "memory: .*mapping of keys.*found 3"),
        ("server: {port: 70000}\n", 1, "server.port: .*65535, found 70000"),
        ("scheduler: {lookahead: -1}\n", 1, "scheduler.lookahead: .*found -1"),
        ("rules: []\n", 1, "rules: expected a shipped rule set"),
        ("- 1\n", 1, "expected a mapping of keys, found list"),
        ("rules: auto\nrules: auto\n", 2, "the key 'rules' appears twice"),
        ("rules: auto\nserver: [1\n", 3, "not valid YAML"),
        ("model: !!python/object/apply:os.system [ls]\n", 1, "the tag .* is not allowed"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert re.search(message, str(caught.value))


def test_all_mistakes_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "modle: x\nserver: {port: 0}\ncpu:\n  threads: none\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["1", "2", "4"]


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "cpu: {threads: 3}\nmemory: {kv: 1GiB}\nscheduler: {policy: hybrimoe, lookahead: 2}\n")
    config = load_config(
        path, gpu_expert_slots=0.5, expert_dtype="int8", memory={"host": "8GiB"}, policy="static", accelerator=None
    )
    assert config.cpu.threads == 3
    assert config.cpu.expert_dtype == "int8"
    assert config.memory.gpu_experts == Amount("share", 0.5)
    assert (config.memory.host, config.memory.kv) == (Amount("bytes", 8 * GIB), Amount("bytes", GIB))
    assert (resolved_policy(config.scheduler)[0], config.scheduler.lookahead) == ("static", 2)
    assert load_config(path, **{"server.port": 80}).server.port == 80


def test_bad_overrides() -> None:
    with pytest.raises(ConfigError, match="unknown option 'gpu_expert_slot'; did you mean 'gpu_expert_slots'"):
        load_config(gpu_expert_slot=1)
    with pytest.raises(ConfigError, match=r"^<option>: cpu.expert_dtype"):
        load_config(expert_dtype="int9")


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "my.yaml").write_text("[]", encoding="utf-8")
    config = load_config(write(tmp_path, "model: model\nrules: my.yaml\n"))
    assert config.model == str(tmp_path / "model")
    assert config.rules == str(tmp_path / "my.yaml")
    assert load_config(write(tmp_path, "model: Qwen/Qwen3-30B-A3B\n")).model == "Qwen/Qwen3-30B-A3B"


def test_adapters_are_found_beside_the_file_and_keep_their_scale(tmp_path: Path) -> None:
    (tmp_path / "style").mkdir()
    own = "server: {models: {other: {model: x, adapters: [style, 'style:0.5']}}}"
    config = load_config(write(tmp_path, f"adapters: ['style:0.5', owner/name]\n{own}\n"))
    style = str(tmp_path / "style")
    assert config.adapters == (f"{style}:0.5", "owner/name")
    assert config.server.models == {"other": {"model": "x", "adapters": [style, f"{style}:0.5"]}}
    assert load_config(config.as_dict()) == config
    assert load_config(config, adapters=str(tmp_path)).adapters == (str(tmp_path),)
    with pytest.raises(ConfigError, match=r"deploy.yaml:1: adapters: .*DIR:SCALE with a scale like 0.5, found 'a:0'"):
        load_config(write(tmp_path, "adapters: 'a:0'\n"))


def test_paths_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes("\ufeffserver:\r\n  port: 81\r\n".encode())
    config = load_config(path, model=tmp_path, rules=tmp_path / "rules.yaml")
    assert (config.server.port, config.model, config.rules) == (81, str(tmp_path), str(tmp_path / "rules.yaml"))


def test_an_unknown_preset_and_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="unknown deployment preset 'low-vrm'; did you mean 'low-vram'"):
        load_config("low-vrm")
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        load_config("nowhere.yaml")


def test_an_empty_file_and_empty_sections_mean_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == DeployConfig()
    assert load_config(write(tmp_path, "cpu:\nmemory:\n")) == DeployConfig()


def test_inline_rules_keep_their_lines(tmp_path: Path) -> None:
    located = load_config(write(tmp_path, "model: x\nrules:\n  - match: {name: a}\n")).located_rules()
    assert not isinstance(located, str)
    assert located.where((0, "match")).endswith("deploy.yaml:3")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("scheduler:\n  policy: hybrimo\n", 2, "scheduler.policy: unknown policy 'hybrimo'.*did you mean 'hybrimoe'"),
        ("scheduler:\n  lookahed: 2\n", 2, "scheduler.lookahed: .*did you mean 'lookahead'"),
        ("scheduler:\n  lookahead: 1\n  cache: mrz\n", 3, "scheduler.cache: .*unknown cache policy 'mrz'"),
        ("scheduler: {policy: hybrimoe}\nrules: auto\n# x\n", 1, ""),
    ],
)
def test_policies_are_checked(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = write(tmp_path, text)
    if not message:
        assert resolved_policy(load_config(path).scheduler)[0] == "hybrimoe"
        return
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_parts_replace_those_of_the_preset_and_keep_its_other_parameters() -> None:
    changed = load_config({"scheduler": {"policy": "hobbit", "cache": "lru"}}).scheduler
    assert resolved_policy(changed)[0] == "on_demand/gate_topk/lru"
    assert resolved_policy(changed)[1]["depth"] == 3
    tuned = load_config({"scheduler": {"balance": "hybrimoe", "prefetch": "impact", "cache": "mrs", "alpha": 0.1}})
    assert resolved_policy(tuned.scheduler)[0] == "hybrimoe/impact/mrs"
    assert tuned.scheduler.parameters == {"alpha": 0.1}


def test_runtime_settings() -> None:
    config = load_config({"accelerator": ["emulated"]}, gpu_expert_slots="1.5MiB", threads=2, policy="static")
    settings = runtime_config(config)
    assert (settings.accelerator, settings.threads, settings.policy) == ("emulated", 2, "static")
    assert parse_amount(settings.gpu_expert_slots) == Amount("bytes", 3 * 2**19)
    slots = [
        runtime_config(load_config({}, gpu_expert_slots=value)).gpu_expert_slots
        for value in (7, 0.5, "auto", "none", 1)
    ]
    assert slots == [7, 0.5, "auto", 0, 1]
    assert [type(value) for value in slots] == [int, float, str, int, int]


def test_a_list_of_accelerators_means_all_of_them() -> None:
    settings = runtime_config(load_config({"accelerator": ["emulated", "emulated"]}))
    assert settings.accelerator == ("emulated", "emulated")
    with pytest.raises(DeviceError, match=r"cuda:63.* not exist.*uses all of its devices: emulated, cuda:63; \[auto"):
        open_devices(runtime_config(load_config({"accelerator": ["emulated", "cuda:63"]})))
    assert choose_accelerators(("cuda:0", "cuda:1")) == ("cuda:0", "cuda:1")


@pytest.mark.parametrize("here", [False, True])
def test_what_follows_auto_is_for_machines_without_an_accelerator(here: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: here)
    assert choose_accelerators(("auto", "emulated", "emulated")) == (("auto",) if here else ("emulated", "emulated"))
    assert choose_accelerators(("auto", "none")) == (("auto",) if here else ("none",))
    assert choose_accelerators(("auto",)) == ("auto",)


def test_json_schema_knows_every_section() -> None:
    keys = {"model", "adapters", "unknown_keys", "vision", "rules", "accelerator", "device_wait_seconds"}
    sections = {"memory", "cpu", "scheduler", "rope", "generation", "server"}
    assert set(json_schema()["properties"]) == keys | sections


def test_speculation_is_a_key_of_replies() -> None:
    assert not load_config({}).generation.speculate
    assert load_config({}, speculate=True).generation.speculate
    assert load_config({"generation": {"speculate": True}}).generation.speculate
    with pytest.raises(ConfigError, match="did you mean 'speculate'"):
        load_config({"generation": {"speculat": True}})


@given(
    st.one_of(
        st.integers(0, 10**6).map(lambda count: Amount("count", count)),
        st.floats(1e-6, 1.0).map(lambda share: Amount("share", share)),
        st.integers(1, 2**50).map(lambda size: Amount("bytes", size)),
        st.sampled_from([Amount("auto"), Amount("none")]),
    )
)
def test_every_amount_survives_its_own_text(amount: Amount) -> None:
    assert parse_amount(str(amount)) == amount


@given(st.floats(1e-6, 1.0), st.integers(1, 10_000), st.integers(0, 10_000))
def test_a_share_is_never_none_and_never_more_than_all(share: float, total: int, auto: int) -> None:
    assert 1 <= Amount("share", share).to_experts(total, 1, auto) <= total
    assert Amount("auto").to_experts(total, 1, auto) == min(total, auto)


@given(st.text(max_size=40))
def test_no_text_crashes_the_parser(text: str) -> None:
    with contextlib.suppress(ConfigError):  # any other exception fails
        assert parse_amount(text).value >= 0


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ("{scaling: yarn, factor: 0.5}", "rope.factor: should be greater than or equal to 1"),
        ("{scaling: yarn}", "rope: scaling yarn needs a factor"),
        ("{scaling: none, factor: 2}", "rope: scaling none has no factor"),
        ("{factor: 2}", "rope: scaling is missing"),
        ("{scaling: yarn, factor: 2, original: 9}", "unknown key 'rope.original'"),
    ],
)
def test_a_scaling_of_positions_that_cannot_be(rope: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text(f"model: x\nrope: {rope}\n")
    with pytest.raises(ConfigError, match=rf"deploy\.yaml:2: {re.escape(words)}"):
        load_config(file)
