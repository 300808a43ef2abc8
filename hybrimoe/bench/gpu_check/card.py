"""Which device is checked, and with what: the labels of the report."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

from gpu_kernels.devices import auto_device, memory_info
from gpu_kernels.opening import existing_device
from hybrimoe.bench.gpu_check.setting import EMULATED
from hybrimoe.errors import DeviceError
from hybrimoe.machine.check import installed
from hybrimoe.machine.facts import environment, machine

PACKAGES = ("triton", "llvmlite", "tokenizers", "llama-cpp-python")
ASKED_OF_THE_DRIVER = (
    "driver_version", "pstate", "pcie.link.gen.current", "pcie.link.width.current", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu",
)  # fmt: skip


def device_name(accelerator: str | None) -> str:
    """The device to check: "emulated", or the torch device that is asked for, or torch's own.

    Raises DeviceError where there is none.
    """
    if accelerator == EMULATED:
        return EMULATED
    if accelerator not in (None, "auto"):
        return str(existing_device(str(accelerator)))
    found = auto_device()
    if found is None:
        raise DeviceError(
            f"no accelerator to check: torch {torch.__version__} finds none here (hybrimoe doctor says more)."
            " With --accelerator emulated the same checks run on the emulated device, as far as they make sense there"
        )
    return str(found)


def kind_of_figures(accelerator: str) -> str:
    """What every figure of the report is called."""
    return "emulated" if accelerator == EMULATED else f"measured on {_name(torch.device(accelerator))}"


def labels(accelerator: str) -> dict[str, Any]:
    """Card, driver, machine and versions as plain data."""
    versions = environment() | {name: installed(name) or "none" for name in PACKAGES}
    return {"card": _card(accelerator), "machine": machine(), "versions": versions}


def _name(device: torch.device) -> str:
    module: Any = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)


def _card(accelerator: str) -> dict[str, Any]:
    if accelerator == EMULATED:
        return {"name": "emulated device (threads of the host)"}
    device = torch.device(accelerator)
    _, total = memory_info(device)
    card: dict[str, Any] = {"name": _name(device), "device": accelerator, "memory_gib": round(total / 2**30, 1)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda_of_torch": torch.version.cuda,
        }
    return card | _driver(device)


def _driver(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says; nothing where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None or device.type != "cuda":
        return {}
    query = [
        program,
        f"--query-gpu={','.join(ASKED_OF_THE_DRIVER)}",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.strip().splitlines()[0].split(",")] if answer.strip() else []
    return dict(zip(ASKED_OF_THE_DRIVER, values, strict=False))
