"""A whole program: `hybrimoe generate` on the demo model, twice. Its process must end soon after its last line."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from hybrimoe.bench.gpu_check.child import python_child, run_child
from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.setting import Setting

NEW_TOKENS = 24
KEPT_S = 12.0
"""Of the section's time, for the stacks of a process that hangs."""
MOST_SILENT_S = 10.0
"""From the last line of a program to its end."""
RUNS = ("first start (compiles kernels)", "second start")


def run(setting: Setting, findings: Findings) -> None:
    """Two runs, the second with kernels compiled before."""
    until = time.monotonic() + setting.limit_s - KEPT_S
    argv = python_child(
        "-m", "hybrimoe", "generate", "--prompt", "It was a bright morning, and Elizabeth", "--seed", "7",
        "--max-new-tokens", str(NEW_TOKENS), "--accelerator", setting.accelerator, "--slots", "0.25",
    )  # fmt: skip
    longest_s = 0.0
    for name in RUNS:
        left_s = until - time.monotonic()
        if left_s < longest_s:
            findings.remark(f"{name}: no time was left for it")
            return
        with tempfile.TemporaryDirectory(prefix="hybrimoe-") as folder:
            ended = run_child(argv, left_s, Path(folder) / "log")
        findings.row(
            "hybrimoe generate", run=name, exit_code=ended.code, seconds=round(ended.seconds, 1),
            seconds_after_last_line=round(ended.silent_s, 1),
        )  # fmt: skip
        longest_s = ended.seconds
        if ended.why:
            findings.problem(f"{name}: {ended.why}")
            findings.remark(f"{ended.output}\n{ended.threads}")
            return
        findings.require(
            ended.silent_s <= MOST_SILENT_S, f"{name}: the process ended {ended.silent_s:.0f} s after its last line"
        )
