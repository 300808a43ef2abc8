"""The process of one section: `python -m hybrimoe.bench.gpu_check.worker MODULE SETTING RESULT`."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

from hybrimoe.bench.gpu_check.findings import Findings, run_section
from hybrimoe.bench.gpu_check.setting import Setting

LATEST_BEGIN = 0.75
"""Part of a section's time after which it begins nothing more."""


def main(module: str, setting_file: Path, result_file: Path) -> None:
    """Runs `module.run(setting, findings)`; its result, or what there is of it so far, lies in `result_file`."""

    def save(data: dict[str, Any]) -> None:
        beside = result_file.with_suffix(".part")
        beside.write_text(json.dumps(data), encoding="utf-8")
        os.replace(beside, result_file)

    setting = Setting.from_json(setting_file.read_text(encoding="utf-8"))
    elapsed_s = time.time() - psutil.Process().create_time()
    findings = Findings(save, until=time.monotonic() + LATEST_BEGIN * setting.limit_s - elapsed_s)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        section = importlib.import_module(module)
        result = run_section(section.run, setting, findings)
    ours = {str(item.message) for item in told if issubclass(item.category, RuntimeWarning)}
    save(result | {"remarks": [*result["remarks"], *(f"warning: {text}" for text in sorted(ours))]})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
