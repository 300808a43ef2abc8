"""What is plainly wrong with a command line is said before torch, transformers and Numba are imported.

All command lines run one after another in a process of their own; each says which heavy modules are loaded after it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybrimoe.cli import app as app_module
from hybrimoe.demo import demo_model_path

HEAVY = ("torch", "transformers", "numba", "scipy", "networkx", "onnx")
RUN = """
import contextlib, io, json, sys
from hybrimoe.cli.app import app

def run(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = app(words, standalone_mode=False, prog_name="hybrimoe")
    return code, out.getvalue(), [name for name in {heavy!r} if name in sys.modules]

print(json.dumps([run(words) for words in json.loads(sys.argv[1])]))
"""


def outcomes(lines: list[list[str]], folder: Path) -> list[tuple[int, str, list[str]]]:
    """Exit code, output, and heavy modules that are loaded afterwards, for each command line."""
    code = RUN.replace("{heavy!r}", repr(HEAVY))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)],
        capture_output=True, text=True, timeout=600, check=False, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(found) for found in json.loads(done.stdout)]


def check(cases: list[tuple[str, str]], folder: Path, *, allowed: tuple[str, ...] = ()) -> None:
    """Each command line fails with its text, before anything heavy is imported (the first one that does is named)."""
    lines = [line.split() for line, _ in cases]
    for (line, text), (code, out, heavy) in zip(cases, outcomes(lines, folder), strict=True):
        assert code, f"{line}: it went through\n{out}"
        assert text in " ".join(out.split()), line
        assert "defect" not in out, line
        assert not set(heavy) - set(allowed), f"{line}: imported {heavy} before it was refused"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Directories that are no models, each in its own way, and files that are broken."""
    demo = demo_model_path()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": ')
    (tmp_path / "untyped").mkdir()
    (tmp_path / "untyped" / "config.json").write_text("{}")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_bytes((demo / "config.json").read_bytes())
    (tmp_path / "file").write_text("no model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "rules.yaml").write_text("- match: {nam: experts}\n  replace: {op: hybrid_experts}\n")
    for name in ("empty", "broken", "gone"):
        (tmp_path / f"{name}.yaml").write_text(f"model: {name}\n")
    (tmp_path / "rules-gone.yaml").write_text("rules: nosuchrules.yaml\n")
    return tmp_path


WRONG_MODELS = [
    ("gone", "no model directory gone"),
    ("cut.gguf", "cut.gguf is truncated or no valid GGUF file: it has 8 bytes"),
    ("empty", "empty is no model directory: it has no config.json"),
    ("broken", "config.json cannot be read as JSON"),
    ("untyped", "it has no model_type"),
    ("file", "file is a file"),
    ("someone/something", "someone/something is no directory here"),
    ("weightless", "weightless has no weights"),
]
TAKES_A_MODEL = [
    "generate --prompt x", "chat", "serve --port 0", "trace record", "trace capture", "bench decode", "bench prefill",
    "bench quality", "bench quality --lossy skip", "bench contention", "bench serve", "bench speculate",
    "bench parallel", "bench kv", "bench needle", "bench long-chat", "bench streaming", "bench soak", "inspect",
]  # fmt: skip
READS_ONLY_THE_CONFIGURATION = ["explain", "rules check moe --model"]


def test_a_wrong_model(folder: Path) -> None:
    cases = [(f"{command} {model}", text) for command in TAKES_A_MODEL for model, text in WRONG_MODELS]
    cases += [
        (f"{command} {model}", text) for command in READS_ONLY_THE_CONFIGURATION for model, text in WRONG_MODELS[:6]
    ]
    cases += [("plan gone", "gone"), ("plan someone/something", "someone/something is no directory here")]
    check(cases, folder)


def test_a_wrong_model_in_a_deployment_file(folder: Path) -> None:
    with_a_file = [command for command in TAKES_A_MODEL if command not in ("bench quality", "inspect")]
    check(
        [
            (f"{command} --config {name}.yaml", text)
            for command in [*with_a_file, "explain"]
            for name, text in (("gone", "no model directory"), ("empty", "no config.json"), ("broken", "as JSON"))
        ],
        folder,
    )


def test_what_else_is_plainly_wrong(folder: Path) -> None:
    check(
        [
            ("generate --prompt-file gone.txt", "cannot read gone.txt"),
            ("generate --prompts gone.jsonl", "cannot read gone.jsonl"),
            ("generate --prompt x --temperature 1000", "temperature must be between"),
            ("generate --prompt x --trace gone/trace.json", "gone/trace.json"),
            ("generate --prompt x --accelerator gpu7", "'gpu7' is no accelerator"),
            ("generate --prompt x --config gone-too.yaml", "gone-too.yaml"),
            ("generate --prompt x --config rules-gone.yaml", "nosuchrules.yaml"),
            ("generate --prompt x --slots many", "--slots: "),
            ("generate --prompt x --dtype int7", "--dtype: should be"),
            ("generate --prompt x --kv-dtype fp8", "--kv-dtype: should be"),
            ("generate --prompt x --rope-scaling yarn", "rope: scaling yarn needs a factor (--rope-scale)"),
            ("chat --rope-scaling yarn --rope-scale 0.5", "--rope-scale"),
            ("serve --rope-scaling none --rope-scale 2", "scaling none has no factor"),
            ("plan --rope-scale 2", "scaling is missing (--rope-scaling)"),
            (
                "explain --rope-scaling ntk --rope-scale 2",
                "--rope-scaling: should be 'none', 'linear', 'dynamic' or 'yarn'",
            ),
            ("bench needle --rope-scaling linear --rope-scale nan", "--rope-scale"),
            ("generate --prompt x --rope-scaling yarn --rope-scale 2 --yarn-orig-ctx 0", "--yarn-orig-ctx"),
            ("serve --attention-sinks 4", "attention_sinks are tokens that context_shift keeps"),
            ("generate --prompts rules.yaml --context-shift", "is for single replies"),
            ("bench kv --kv-dtype fp8", "dtype of keys and values"),
            ("plan --kv-dtype fp8", "dtype of keys and values"),
            ("generate --prompt x --unknown-keys forgive", "unknown_keys"),
            ("generate --prompt x --adapter gone", "no adapter gone"),
            ("chat --adapter empty", "empty is no adapter: it has no adapter_config.json"),
            ("serve --adapter empty:zero", "no adapter empty:zero"),
            ("inspect --adapter gone:0.5", "no adapter gone"),
            ("ctl status --url ftp://x", "expected an address like http://127.0.0.1:8000"),
            ("ctl slots 4 --url 127.0.0.1:1", "no server answers at http://127.0.0.1:1"),
            ("convert weightless out --adapter gone", "weightless has no weights"),
            ("convert gone out", "no model directory gone"),
            ("convert cut.gguf out", "cut.gguf is truncated"),
            ("verify gone", "gone is no pack"),
            ("verify weightless", "weightless is no pack"),
            ("generate --prompts rules.yaml --batching expertflow --route-predictor gone.onnx", "gone.onnx"),
            ("chat --top-p 0.5 --accelerator gpu7", "'gpu7' is no accelerator"),
            ("serve --accelerator gpu7", "'gpu7' is no accelerator"),
            ("explain --rules gone.yml", "gone.yml"),
            ("explain --rules rules.yaml", "rules.yaml:1"),
            ("rules check gone.yml", "gone.yml"),
            ("rules show gone.yml", "gone.yml"),
            ("trace record --prompts gone.txt", "gone.txt"),
            ("trace record --out gone/trace.npz", "gone/trace.npz"),
            ("trace capture --out gone/run.json.gz", "gone/run.json.gz"),
            ("trace analyze gone.npz", "no trace at gone.npz"),
            ("trace analyze --html gone/page.html", "gone/page.html"),
            ("trace train gone.npz", "no trace at gone.npz"),
            ("trace train --out gone/net.onnx", "gone/net.onnx"),
            ("trace train --target everything", "everything"),
            ("simulate --trace gone.npz", "no trace at gone.npz"),
            ("simulate --hardware abacus", "abacus"),
            ("simulate --model-shape gone", "gone"),
            ("simulate --replay gone.json.gz", "gone.json.gz"),
            ("simulate --cache-model gone.onnx", "gone.onnx"),
            ("explain-step --trace gone.npz", "no trace at gone.npz"),
            ("explain-step --hardware abacus", "abacus"),
            ("explain-step --chrome gone/trace.json", "gone/trace.json"),
            ("plan --hardware abacus", "abacus"),
            ("plan --gpu-memory much", "much"),
            ("calibrate --shape gone", "gone"),
            ("calibrate --dtype int7", "int7"),
            ("calibrate --accelerator gpu7", "'gpu7' is no accelerator"),
            ("calibrate --output file/profile.yaml", "file"),
            ("bench decode --shape gone", "gone"),
            ("bench decode --gguf gone.gguf", "gone.gguf"),
            ("bench prefill --dtype int7", "int7"),
            ("bench kernels --csv gone/rows.csv", "gone/rows.csv"),
            ("bench kernels --plot gone/plot.png", "gone/plot.png"),
            ("bench quality --text gone.txt", "gone.txt"),
            ("bench quality --csv gone/rows.csv", "gone/rows.csv"),
            ("bench quality --dtype int7", "int7"),
            ("bench batching --trace gone.npz", "no trace at gone.npz"),
            ("bench ablation --trace gone.npz", "no trace at gone.npz"),
            ("bench ablation --out file", "file"),
            ("bench ablation --experiment everything", "everything"),
            ("bench serve --accelerator gpu7", "'gpu7' is no accelerator"),
        ],
        folder,
    )
    left = {path.name for path in folder.iterdir()}
    assert left.isdisjoint({"gone", "trace.npz", "run.json.gz", "predictor.onnx", "ablation"}), "a file was left behind"


def test_a_value_that_an_option_cannot_have_is_wrong_usage(folder: Path) -> None:
    cases = [
        ("plan --dense-dtype int7", "--dense-dtype: unknown dtype 'int7'"),
        ("plan --expert-dtype int7", "--expert-dtype: unknown dtype 'int7'"),
        ("plan --kv-dtype fp8", "unknown dtype of keys and values 'fp8'"),
        ("plan --gpu-memory much", "--gpu-memory: expected a size like 12GiB, found 'much'"),
        ("plan --host-memory -5", "--host-memory: expected a size like 12GiB, found '-5'"),
        ("plan --hardware abacus", "unknown hardware profile 'abacus'"),
        ("plan --context 0", "--context"),
        ("generate --prompt x --prefix-cache much", "--prefix-cache: expected a size like 4GiB"),
        ("serve --prefix-cache-disk -1", "--prefix-cache-disk: expected a size like 4GiB"),
        ("serve --port 70000", "--port"),
        ("generate --prompt x --dtype int7", "--dtype: should be"),
        ("serve --host-memory much", "--host-memory: "),
        ("serve --parallel 65", "--parallel"),
    ]
    check(cases, folder, allowed=("numba", "scipy"))  # the scheduler's, which checks the policy before
    lines = [line.split() for line, _ in cases]
    assert {code for code, *_ in outcomes(lines, folder)} == {2}


def test_names_of_policies_need_the_scheduler_but_not_torch(folder: Path) -> None:
    check(
        [
            ("generate --prompt x --policy nosuchpolicy", "nosuchpolicy"),
            ("generate --prompt x --policy=", "--policy: unknown policy ''"),
            ("generate --prompt x --lossy nosuchkind", "nosuchkind"),
            ("generate --prompts rules.yaml --batching nosuchkind", "nosuchkind"),
            ("bench decode --policy nosuchpolicy", "nosuchpolicy"),
        ],
        folder,
        allowed=("numba", "scipy"),
    )


def test_help_imports_nothing_heavy(folder: Path) -> None:
    lines = [["--help"], *([name, "--help"] for name in app_module.COMMANDS)]
    for name in app_module.COMMANDS:
        lines += [[name, leaf, "--help"] for leaf in getattr(app_module.load_command(name), "commands", {})]
    for words, (code, out, heavy) in zip(lines, outcomes(lines, folder), strict=True):
        assert code == 0, words
        assert "Usage" in out, words
        assert heavy == [], f"hybrimoe {' '.join(words)} imported {heavy}"
