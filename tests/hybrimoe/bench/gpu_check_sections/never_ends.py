"""A section whose result is complete and whose process does not end: a thread of it lives on."""

import sys
import threading

from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.setting import Setting


def run(setting: Setting, findings: Findings) -> None:
    findings.row("found", what="all", us=3.5)
    threading.Thread(target=live_on).start()


def live_on() -> None:
    sys.stdout.write("waiting\n")
    sys.stdout.flush()
    threading.Event().wait()
