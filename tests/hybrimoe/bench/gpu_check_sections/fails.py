"""A section that finds something, then fails."""

from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.setting import Setting


def run(setting: Setting, findings: Findings) -> None:
    findings.row("found", what="before the failure", us=1.5)
    raise ArithmeticError("seven is not eight")
