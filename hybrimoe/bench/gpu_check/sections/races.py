"""compute-sanitizer over a small program that copies experts into slots and computes them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hybrimoe.bench.gpu_check.child import python_child, run_child
from hybrimoe.bench.gpu_check.findings import Findings, SkippedError
from hybrimoe.bench.gpu_check.setting import Setting

PROGRAM = "hybrimoe.bench.gpu_check.sections.small_program"
TOOLS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "memcheck": ("transformers", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    "racecheck": ("auto", {}),
}
"""By tool, how decode steps run (`cpu.step`), and the environment. memcheck sees an access beyond a tensor where each
is an allocation of its own; no graph can be recorded then."""
USUAL_PLACE = "/usr/local/cuda/bin/compute-sanitizer"
FOUND_ERRORS = 86
"""The exit code that the tool is told to give."""
FOUND = "========= "
TOLD_LINES = 100
KEPT_S = 12.0


def run(setting: Setting, findings: Findings) -> None:
    """Each tool in half of the section's time."""
    if not setting.accelerator.startswith("cuda"):
        raise SkippedError(f"compute-sanitizer is for CUDA devices, not for {setting.accelerator}")
    sanitizer = shutil.which("compute-sanitizer") or (USUAL_PLACE if Path(USUAL_PLACE).exists() else None)
    if sanitizer is None:
        raise SkippedError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    for tool, (step, extra) in TOOLS.items():
        argv = [
            sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS),
            *python_child("-m", PROGRAM, setting.accelerator, step),
        ]  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="hybrimoe-") as folder:
            log = Path(folder) / "log"
            ended = run_child(argv, (setting.limit_s - KEPT_S) / len(TOOLS), log, extra=extra)
            found = first_errors(log.read_text(encoding="utf-8", errors="replace"))
        summary = [line.strip("= ") for line in ended.output.splitlines() if "SUMMARY" in line]
        findings.row("compute-sanitizer", tool=tool, seconds=round(ended.seconds, 1), result="; ".join(summary))
        if ended.code is None:
            findings.remark(f"{tool} did not end in {ended.seconds:.0f} s: nothing is known of it")
        elif ended.why:
            findings.problem(f"{tool}: {ended.why}; {'; '.join(summary)}")
            findings.remark(found)


def first_errors(output: str) -> str:
    """The first of what the tool found, from which the later ones often follow; all of an output without any."""
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith(FOUND) and "COMPUTE" not in line), 0)
    return "\n".join(lines[first : first + TOLD_LINES])
