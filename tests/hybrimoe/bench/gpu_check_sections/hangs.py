"""A section that finds something, then waits for what never comes."""

import sys
import threading

from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.setting import Setting


def run(setting: Setting, findings: Findings) -> None:
    findings.row("found", what="before the hang", us=2.5)
    wait_for_ever()


def wait_for_ever() -> None:
    sys.stdout.write("waiting\n")
    sys.stdout.flush()
    threading.Event().wait()
