"""Lossy policies from the command line and from deployment files, on the demo model, end to end."""

import pytest

from hybrimoe.config.deploy import load_config
from hybrimoe.config.runtime import runtime_config
from hybrimoe.config.scheduler import lossy_option
from hybrimoe.errors import ConfigError, ModelError
from scheduler.lossy import LOSSY_POLICIES

RUNS = [*((kind, "emulated") for kind in sorted(LOSSY_POLICIES)), *((kind, "none") for kind in ("hobbit", "bit_width"))]


@pytest.mark.parametrize(("kind", "accelerator"), RUNS)
def test_every_kind_generates_and_says_that_it_is_lossy(hybrimoe, kind, accelerator):
    dtype = "int4" if LOSSY_POLICIES[kind].uses_planes else "bfloat16"
    words = ["generate", "-p", "The King", "-n", 6, "-t", 0, "--dtype", dtype, "--lossy", kind]
    found = hybrimoe(*words, "--accelerator", accelerator, "--json")
    assert found.code == 0, found.err
    experts = found.data["experts"]
    assert experts["lossy"].split()[0] == kind
    assert experts["decode"]["routed"] == 5 * 6 * 4
    assert found.data["config"]["scheduler"]["lossy"] == {"kind": kind}
    assert found.data["text"]


def test_the_summary_tells_it(hybrimoe):
    words = ["generate", "-p", "The King", "-n", 4, "--dtype", "int8", "--lossy", "hobbit:misses_only=false"]
    found = hybrimoe(*words)
    assert found.code == 0
    flat = " ".join(found.err.split())
    assert "lossy hobbit (misses_only=False, low_dtype=int4): of the routed experts" in flat
    assert "in low precision" in flat
    lossless = hybrimoe("generate", "-p", "The King", "-n", 4)
    assert "lossy" not in lossless.err


@pytest.mark.parametrize(
    ("lossy", "message"),
    [("hobit", "did you mean 'hobbit'"), ("hobbit:t9=1", "unknown parameter 't9'"), ("hobbit:t1", "KIND:name=value"),
     ("hobbit:t1=[", "'[' is no value of a parameter"),
     ("swapmoe:budget=some", "expected a size"), ("hobbit", "copy as int4 is not smaller than the expert as int4")],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(hybrimoe, lossy, message):
    found = hybrimoe("generate", "-p", "The King", "-n", 2, "--lossy", lossy)
    assert found.code == 2
    assert message in " ".join(found.err.split())


def test_a_deployment_file_and_overrides(tmp_path):
    file = tmp_path / "deploy.yaml"
    file.write_text("scheduler:\n  policy: ours\n  lossy: {kind: swapmoe, budget: 2GiB, frequency: 4}\n")
    config = load_config(file)
    runtime = runtime_config(config).lossy
    assert dict(runtime.params) == {"frequency": 4, "budget_bytes": 2 << 30}
    assert load_config(config.as_dict()) == config
    assert runtime_config(load_config(file, policy="static")).lossy == runtime
    assert runtime_config(load_config(file, lossy="none")).lossy is None
    assert runtime_config(load_config(file, lossy={"kind": "skip"})).lossy.kind == "skip"
    assert runtime_config(load_config({})).lossy is None
    for budget, params in (("25%", {"budget": 0.25}), ("64", {"budget": 64}), ("auto", {})):
        found = runtime_config(load_config({"scheduler": {"lossy": {"kind": "emoe", "budget": budget}}})).lossy
        assert dict(found.params) == params


def test_a_mistake_in_a_file_names_its_line(tmp_path):
    file = tmp_path / "deploy.yaml"
    file.write_text("scheduler:\n  policy: ours\n  lossy: {kind: hobbit, t1: 3}\n")
    with pytest.raises(ConfigError, match=r"deploy\.yaml:3: scheduler\.lossy: hobbit: t1 must be a number"):
        load_config(file)


def test_an_option_becomes_a_mapping():
    assert lossy_option("skip") == {"kind": "skip"}
    assert lossy_option("hobbit:t1=0.5, misses_only=false") == {"kind": "hobbit", "t1": 0.5, "misses_only": False}
    assert lossy_option("emoe:budget=2GiB") == {"kind": "emoe", "budget": "2GiB"}


def test_simulate_sets_lossy_rows_beside_the_lossless_one(hybrimoe):
    words = ["simulate", "--policy", "ours", "--lossy", "skip", "--lossy", "hobbit", "--expert-dtype", "bfloat16"]
    found = hybrimoe(*words, "--max-tokens", 60, "--phase", "decode", "--json")
    assert found.code == 0, found.err
    assert [row["lossy"].split(" ")[0] for row in found.data] == ["", "skip", "hobbit"]
    assert found.data[1]["latency_ms"] < found.data[0]["latency_ms"]
    assert hybrimoe("simulate", "--lossy", "skp").code == 2


def test_experts_that_were_given_up_cannot_be_restored():
    import hybrimoe

    model = hybrimoe.load(
        expert_dtype="bfloat16", accelerator="none", lossy={"kind": "bit_width"}, packed_file=False, progress=False
    )
    with pytest.raises(ModelError, match="kept in low precision only"):
        model.hybrimoe.restore()
    model.hybrimoe.session.close()


def test_the_document_names_every_kind_and_parameter():
    from dataclasses import fields
    from pathlib import Path

    from scheduler.lossy import LowCopy
    from scheduler.setting import parameters_of

    text = (Path(__file__).parents[3] / "docs" / "lossy.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for kind, maker in LOSSY_POLICIES.items():
        known = set(parameters_of(maker)) | ({f.name for f in fields(LowCopy)} if maker.uses_low_copy else set())
        shared = {"budget_bytes"} if kind in ("swapmoe", "emoe") else set()  # said once below the table: "2GiB"
        missing = {name for name in known - shared if f"`{name}`" not in rows[kind]}
        assert not missing, f"{kind}: {missing}"
