"""The ablation: rows say where they come from, a stopped sweep goes on, tables follow from rows."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import yaml_rules
from hybrimoe.bench.ablation import sweep as ablation_sweep
from hybrimoe.bench.ablation.cases import SENSITIVITY, every_policy, hit_rates, sensitivity, speedups, table_3
from hybrimoe.bench.ablation.spread import ClusterError, on_cluster
from hybrimoe.bench.ablation.summary import bound_share, oracle_share, summarise, tables
from hybrimoe.bench.ablation.sweep import DEMO, Case, run_case, sweep
from hybrimoe.cli.bench.ablation import build_cases, write
from hybrimoe.errors import MissingExtraError
from hybrimoe.machine.profiles import open_hardware, with_changes
from hybrimoe.tracing.sources import DEMO_TRACE
from scheduler.errors import ProfileError
from scheduler.traces.trace import Trace

CASE = Case("policies", "static", "laptop", "", DEMO, 0.25, "decode", n_decode=12)


def test_a_row_names_its_origin():
    row = run_case(CASE)
    assert row["kind"] == "simulated"
    assert row["latency_ms"] > 0
    assert {"hybrimoe", "python", "commit", "numpy", "hardware", "seed"} <= set(row)


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    cases = [replace(CASE, policy=policy) for policy in ("static", "fiddler", "freetoken")]
    ran = []

    def stops(case):
        if case.policy == "freetoken" and len(ran) < 3:
            ran.append("stop")
            raise KeyboardInterrupt
        ran.append(case.policy)
        return run_case(case)

    monkeypatch.setattr(ablation_sweep, "run_case", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(cases, tmp_path)
    assert ran == ["fiddler", "stop"]
    rows = sweep(cases[:2], tmp_path)
    assert ran == ["fiddler", "stop", "static"]
    assert [row["policy"] for row in rows] == ["static", "fiddler"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_half_written_row_is_computed_again(tmp_path):
    (tmp_path / f"{CASE.key}.json").write_text('{"latency_ms"')
    assert [row["policy"] for row in sweep([CASE], tmp_path)] == ["static"]
    assert json.loads((tmp_path / f"{CASE.key}.json").read_text())["policy"] == "static"
    assert CASE.key != replace(CASE, seed=1).key


def test_several_processes_give_the_same_rows(tmp_path):
    cases = [replace(CASE, policy=policy) for policy in ("static", "fiddler")]
    alone = sweep(cases, tmp_path / "one")
    together = sweep(cases, tmp_path / "two", jobs=2)
    assert alone == together


def test_a_row_of_other_sources_traces_or_profiles_is_not_taken(tmp_path, monkeypatch):
    """The key of a row follows the contents of everything that it is made of, not only the names."""
    trace, hardware, policy = tmp_path / "t.npz", tmp_path / "h.yaml", tmp_path / "p.py"
    trace.write_bytes(DEMO_TRACE.read_bytes())
    laptop = Path(yaml_rules.__file__).parent / "hardware" / "laptop.yaml"
    hardware.write_text(laptop.read_text())
    policy.write_text(
        "from scheduler.extension import *\n@policy('keyed')\n"
        "def keyed(costs: LayerCosts, spare: int = 0) -> Assignment:\n    return Assignment(range(len(costs)), [])\n"
    )
    case = replace(CASE, trace=str(trace), hardware=str(hardware), policy=str(policy))
    keys = [case.key]
    changes = (
        lambda: Trace.load(trace).head(50).save(trace),
        lambda: hardware.write_text(laptop.read_text().replace("read_gbps: ", "read_gbps: 1")),
        lambda: policy.write_text(policy.read_text().replace("spare: int = 0", "spare: int = 1")),
        lambda: monkeypatch.setattr(ablation_sweep, "_own_sources", lambda: "another"),
    )
    for change in changes:
        change()
        keys.append(case.key)
    assert len(set(keys)) == len(keys)
    assert set(case.files) == {trace, hardware, policy}
    moved = case.moved({str(path): f"/far/{path.name}" for path in case.files})
    assert (moved.trace, moved.hardware, moved.policy) == ("/far/t.npz", "/far/h.yaml", "/far/p.py")


HANG_SECONDS = 600  # far less than the workers' work
KILLED = """
import os, sys, time
from pathlib import Path
from hybrimoe.bench.ablation.spread import in_processes

def busy(folder):
    (Path(folder) / f"{os.getpid()}.pid").touch()
    end = time.monotonic() + 3600.0
    while time.monotonic() < end:
        pass

if __name__ == "__main__":
    list(in_processes(busy, [sys.argv[1]] * 2, 2))
"""


def test_the_processes_of_a_killed_sweep_end(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while len(found := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [psutil.Process(int(path.stem)) for path in found]
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=HANG_SECONDS)
    for left in alive:
        left.kill()
    assert not alive, "workers outlived the sweep"


@pytest.fixture(scope="module")
def ray_cluster():
    """A local Ray cluster of two workers: runs a Python program that may connect to it; gives what it prints."""
    ray = pytest.importorskip("ray")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        next(on_cluster(run_case, [CASE], [[]]))
    ray.init(num_cpus=2, include_dashboard=False)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def program(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    yield program
    ray.shutdown()


def test_rows_of_a_ray_cluster(ray_cluster, tmp_path):
    """Code and traces are shipped; rows are those of this process."""
    trace = tmp_path / "t.npz"
    Trace.load(DEMO_TRACE).head(60).save(trace)
    cases = [replace(CASE, trace=str(trace), policy=policy) for policy in ("static", "fiddler")]
    assert ray_cluster(RAY_SWEEP, trace, tmp_path / "ray") == sweep(cases, tmp_path / "here")


def test_a_lost_worker_of_a_ray_cluster_costs_its_rows_only(ray_cluster, tmp_path):
    assert ray_cluster(RAY_LOSS, tmp_path) == [[0, 0], [1, 2], [2, 4], [3, 6]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-1", "1-1", "1-2", "2-1", "3-1"]


RAY_SWEEP = """
import json, sys
from dataclasses import replace
from pathlib import Path
from hybrimoe.bench.ablation.sweep import Case, sweep

case = Case("policies", "static", "laptop", "", sys.argv[1], 0.25, "decode", n_decode=12)
rows = sweep([replace(case, policy=p) for p in ("static", "fiddler")], Path(sys.argv[2]), cluster=True)
print(json.dumps(rows))
"""
RAY_LOSS = """
import json, os, sys
from pathlib import Path
from hybrimoe.bench.ablation.spread import on_cluster

folder = Path(sys.argv[1])

def run(item, files):
    attempt = 1 + len(list(folder.glob(f"{item}-*")))
    (folder / f"{item}-{attempt}").touch()
    if (item, attempt) == (1, 1):
        os._exit(1)
    return 2 * item

print(json.dumps(sorted(on_cluster(run, range(4), [[]] * 4))))
"""


def test_cluster_needs_ray(tmp_path):
    pytest.importorskip("joblib")
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("ray is installed")
    with pytest.raises(MissingExtraError, match="ray"):
        sweep([CASE], tmp_path, cluster=True)


def test_the_papers_experiments_are_there():
    assert {case.label for case in table_3(8)} == {
        "baseline",
        "+ scheduling",
        "+ prefetching",
        "+ caching",
        "all",
        "+ scheduling, text",
        "all, text",
        "ours",
    }
    found = speedups(8)
    assert {case.n_prefill for case in found if case.phase == "prefill"} == {32, 128, 512, 1024}
    assert {case.cache_ratio for case in found if case.phase == "decode"} == {0.25, 0.5, 0.75}
    assert {case.label for case in hit_rates(8)} == {"lru", "mrs"}
    changed = sensitivity(8)
    assert len(changed) == 9 * len(SENSITIVITY)
    assert len({case.key for case in changed}) == len(changed)
    every = every_policy([(DEMO, "")], 8, (0.25,))
    assert len({case.hardware for case in every}) == 5
    assert "oracle" in {case.policy for case in every}
    every = build_cases(("table3", "paper", "hits", "policies"), quick=False)
    assert len({case.key for case in every}) > 250


def test_figures_over_seeds_have_a_spread(tmp_path):
    """Each seed's speed-up is taken within the seed; what is printed is their mean and standard deviation."""
    times = {0: {"static": 10.0, "ours": 5.0, "oracle": 4.0}, 1: {"static": 12.0, "ours": 4.0, "oracle": 3.0}}
    rows = [row(name, ms, seed=seed) for seed, group in times.items() for name, ms in group.items()]
    summary = summarise(rows)
    ours = next(r for r in summary["policies"] if r["policy"] == "ours")
    assert summary["seeds"] == [0, 1]
    assert (ours["speedup"], ours["sd"]["speedup"]) == (2.5, pytest.approx(0.5**0.5))
    shown = next(cells for cells in tables(summary)[0][2] if cells[0] == "ours")
    assert shown[1] == "2.50 ± 0.71x"
    pytest.importorskip("matplotlib")
    pictures = {path.name for path in write(tmp_path, rows, summary) if path.suffix == ".png"}
    assert pictures == {"policies.png", "lanes-t.png"}
    rows += [{**row, "cache_ratio": 0.5} for row in rows]
    assert "share-t.png" in {path.name for path in write(tmp_path, rows, summarise(rows))}
    assert r"2.50 $\pm$ 0.71x" in (tmp_path / "tables.tex").read_text()


def test_a_seed_begins_a_recorded_trace_with_another_sequence():
    first, other = (run_case(replace(CASE, seed=seed)) for seed in (0, 1))
    assert first["latency_ms"] != other["latency_ms"]
    assert build_cases(("hits",), quick=True, seeds=range(3))[-1].seed == 2


def row(policy, latency_ms, **more):
    plain = {"experiment": "policies", "hardware": "h", "shape": "s", "trace": "t", "cache_ratio": 0.25,
             "phase": "decode", "n_prefill": 0, "hit_rate": 0.5, "prefetches": 0, "prefetch_precision": 0.0,
             "bound_ms": 4.0, "cpu_busy": 0.5, "accel_busy": 0.25, "link_busy": 0.25}  # fmt: skip
    return {**plain, "policy": policy, "label": policy, "latency_ms": latency_ms, **more}


def test_rows_of_compared_policies_say_what_no_policy_can_beat():
    compared = [run_case(replace(CASE, experiment="policies", policy=policy)) for policy in ("static", "oracle")]
    assert len({row["bound_ms"] for row in compared}) == 1
    assert all(0.0 < row["bound_ms"] <= row["latency_ms"] for row in compared)
    assert run_case(replace(CASE, experiment="hits"))["bound_ms"] is None


def test_a_changed_assumption_changes_the_row():
    """A faster link shortens what the link decides; the table says how far every figure is off."""
    few = [replace(case, n_prefill=16, n_decode=3) for case in sensitivity(3) if case.phase == "decode"]
    rows = [run_case(c) for c in few if c.variant in ("as assumed", "link 8 GB/s") and c.label == "+ scheduling"]
    assert rows[1]["latency_ms"] < rows[0]["latency_ms"]
    assumed, faster = summarise(rows)["sensitivity"]
    assert faster["off"]["+ scheduling, decode"] < assumed["off"]["+ scheduling, decode"]
    assert tables(summarise(rows))[0][1] == ("", "+ scheduling, decode", "largest")


@pytest.mark.parametrize("changes", ["link.speed=8", "link.gbps=fast", "link", "name=3", "link.gbps=-1"])
def test_changes_that_a_profile_does_not_have(changes):
    with pytest.raises(ProfileError, match=r"change|gbps"):
        with_changes(open_hardware("laptop"), changes)


def test_share_of_the_way_to_the_oracle():
    group = {name: row(name, ms) for name, ms in (("static", 10.0), ("ours", 6.0), ("oracle", 5.0))}
    assert oracle_share(group, "ours") == pytest.approx(0.8)
    assert oracle_share({**group, "oracle": row("oracle", 10.0)}, "ours") is None
    assert bound_share(group, "ours") == pytest.approx(4 / 6)
    assert bound_share({**group, "static": row("static", 4.0)}, "ours") is None
    (ours,) = [r for r in summarise(list(group.values()))["policies"] if r["policy"] == "ours"]
    assert ours["speedup"] == pytest.approx(10 / 6)
    assert (ours["oracle_share"], ours["bound_share"]) == (pytest.approx(0.8), pytest.approx(4 / 6))


def test_tables_and_files(tmp_path):
    rows = [
        row("static", 210.0, experiment="table3", label="baseline"),
        row("hybrimoe", 110.0, experiment="table3", label="all"),
    ]
    rows += [row("static", 10.0), row("ours", 6.0), row("oracle", 5.0)]
    summary = summarise(rows)
    steps = {(r["step"], r["phase"]): r for r in summary["table3"]}
    assert steps["all", "decode"]["speedup"] == pytest.approx(210 / 110)
    assert steps["all", "decode"]["off"] == pytest.approx(0.0)
    assert tables(summary)[0][0].startswith("Table III")
    names = {path.name for path in write(tmp_path, rows, summary)}
    assert names >= {"rows.csv", "summary.json", "tables.md", "tables.tex", "report.html"}
    assert "| all | hybrimoe_released | decode | 0.110 s |" in (tmp_path / "tables.md").read_text()
    paper = (tmp_path / "tables.tex").read_text()
    assert paper.count(r"\begin{tabular}") == len(tables(summary)) == paper.count(r"\bottomrule")
    assert r"hybrimoe\_released & decode" in paper
    assert r"-2\%" in paper or r"+0\%" in paper
    assert "simulated" in (tmp_path / "report.html").read_text()


def test_lossy_rows_are_set_against_the_lossless_run_of_the_same_policy_and_machine():
    from hybrimoe.bench.ablation.cases import lossy
    from hybrimoe.bench.ablation.summary import summarise, tables
    from scheduler.lossy import LOSSY_POLICIES

    times = {("a", "lossless"): 10.0, ("a", "skip"): 5.0, ("b", "lossless"): 30.0, ("b", "skip"): 10.0}
    rows = [
        {"experiment": "lossy", "policy": "ours", "hardware": machine, "label": label, "latency_ms": ms,
         "hit_rate": 0.5, "changed": 0.0 if label == "lossless" else 0.25, "expert_dtype": dtype,
         "link_bytes": 8 << 20, "tokens": 4}
        for (machine, label), ms in times.items() for dtype, ms in (("bfloat16", ms), ("int4", ms / 4))
    ]  # fmt: skip
    found = summarise(rows)
    skip = next(row for row in found["lossy"] if (row["lossy"], row["expert_dtype"]) == ("skip", "bfloat16"))
    assert (skip["speedup"], skip["least"], skip["most"], skip["mib_per_token"]) == (2.5, 2.0, 3.0, 2.0)
    drawn = [row[3:] for row in tables(found)[0][2] if row[1] == "skip"]
    assert drawn == [("2.50x", "2.00 - 3.00", "50.0%", "2", "25%")] * 2, "each dtype against its own lossless run"
    cases = lossy(8)
    assert {case.lossy for case in cases} == {"", *LOSSY_POLICIES}
    assert {case.expert_dtype for case in cases if case.lossy == "d2moe"} == {"int4"}
    assert {case.expert_dtype for case in cases if case.lossy == ""} == {"int4", "bfloat16"}
    assert len({case.key for case in cases}) == len(cases)
