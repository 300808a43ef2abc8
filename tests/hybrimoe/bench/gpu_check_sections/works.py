"""A section that is content."""

from hybrimoe.bench.gpu_check.findings import Findings
from hybrimoe.bench.gpu_check.setting import Setting


def run(setting: Setting, findings: Findings) -> None:
    findings.row("found", what="<all> | well", us=4, rate=None)
    findings.remark("a remark\nof two lines")
