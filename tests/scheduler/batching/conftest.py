"""A machine with round numbers."""

import pytest

from scheduler.machine.profile import HardwareProfile


@pytest.fixture(scope="session")
def tiny_profile():
    return HardwareProfile.from_mapping({
        "name": "tiny",
        "provenance": "datasheet",
        "cpu": {"read_gbps": 10.0, "gflops": {"bfloat16": 100.0, "float32": 50.0}, "overhead_us": 4.0},
        "accel": {"mem_gbps": 100.0, "tflops": 1.0, "launch_us": 2.0},
        "link": {"gbps": 5.0, "latency_us": 10.0},
    })  # fmt: skip
