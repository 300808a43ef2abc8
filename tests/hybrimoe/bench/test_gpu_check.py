"""The acceptance kit: results outlive failures and hangs, reports parse, and the sections run on devices that are not
there."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gpu_kernels import DeviceNotFoundError
from hybrimoe.bench.gpu_check import check as kit
from hybrimoe.bench.gpu_check import child, report
from hybrimoe.bench.gpu_check.card import device_name
from hybrimoe.bench.gpu_check.findings import Findings, run_section
from hybrimoe.bench.gpu_check.sections import (
    SECTIONS,
    Section,
    chosen,
    lost_copy,
    memory,
    models,
    no_memory,
    overlap,
    parity,
    races,
)
from hybrimoe.bench.gpu_check.sections.profiled import (
    CPU_LANE,
    WAIT,
    Seen,
    begun_while,
    both_us,
    busy_us,
    profile,
    read_trace,
)
from hybrimoe.bench.gpu_check.setting import SMALL_MODEL, Setting, setting_for
from hybrimoe.errors import ConfigError, DeviceError
from tests.fake_device import DEVICE_TYPE, Cards, fake_cards

MINE = "tests.hybrimoe.bench.gpu_check_sections"
CARD = f"{DEVICE_TYPE}:0"
TAGS_WITHOUT_END = {"meta"}


def section(number: int, name: str) -> Section:
    return Section(f"{name}-{number}", f"The section that {name}", 30, 30, module=f"{MINE}.{name}")


def run_kit(folder: Path, *names: str, minutes: float = 5.0) -> dict[str, Any]:
    told: list[dict[str, Any]] = []
    result = kit.check("emulated", minutes, folder, told.append, sections=[section(*item) for item in enumerate(names)])
    assert told == result["sections"]
    return result


class Balanced(HTMLParser):
    """Every tag that is opened is closed in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not any(name in ("src", "href") and not value.startswith("#") for name, value in attrs)
        if tag not in TAGS_WITHOUT_END:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_failing_section_leaves_the_others_results(tmp_path: Path) -> None:
    result = run_kit(tmp_path, "works", "fails", "works")
    assert [found["status"] for found in result["sections"]] == ["ok", "failed", "ok"]
    failed = result["sections"][1]
    assert failed["why"] == "the section: ArithmeticError: seven is not eight"
    assert failed["tables"] == {"found": [{"what": "before the failure", "us": 1.5}]}
    assert "fails.py" in failed["remarks"][0]
    assert (result["ok"], result["complete"]) == (False, True)


class Hanging(child.Child):
    """The time of a section that hangs is over once it does, on a machine of any speed."""

    def ended(self) -> child.Ended | None:
        if self._hangs():
            self._limit_s = 0.0
        return super().ended()

    def _hangs(self) -> bool:
        result = self._log.with_suffix(".json")
        if "waiting" not in self._log.read_text() or not result.exists():
            return False
        return self._log.name.startswith("hangs") or json.loads(result.read_text()).get("status") == "ok"


def test_hanging_sections_are_cut_off_and_say_where_they_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "Child", Hanging)
    result = run_kit(tmp_path, "hangs", "never_ends", "works", minutes=60.0)
    hung, unended, fine = result["sections"]
    assert (hung["status"], unended["status"], fine["status"]) == ("failed", "failed", "ok")
    assert "had not ended" in hung["why"]
    assert "before it was done" in hung["why"]
    assert hung["tables"]["found"][0]["us"] == 2.5
    assert "wait_for_ever" in hung["log"]
    assert "after its last result" in unended["why"]
    assert unended["tables"]["found"][0]["us"] == 3.5
    assert "live_on" in unended["log"]


def test_a_child_has_so_long_to_end(tmp_path: Path) -> None:
    ended = child.run_child([sys.executable, "-c", "import time; time.sleep(600)"], 0.1, tmp_path / "log")
    assert ended.code is None
    assert "had not ended" in ended.why


def test_parts_without_time_are_told() -> None:
    def run(setting: Setting, findings: Findings) -> None:
        for what in ("one", "two"):
            assert not findings.time_for(what)

    result = run_section(run, Setting("emulated", "emulated"), Findings(until=0.0))
    assert (result["status"], result["why"]) == ("ok", "no time for one, two")


def test_a_failing_part_leaves_the_other_parts() -> None:
    def run(setting: Setting, findings: Findings) -> None:
        for number in range(3):
            with findings.part(f"part {number}"):
                findings.row("found", one_over=1 / (number - 1))

    result = run_section(run, Setting("emulated", "emulated"), Findings())
    assert [row["one_over"] for row in result["tables"]["found"]] == [-1.0, 1.0]
    assert (result["status"], result["why"]) == ("failed", "part 1: ZeroDivisionError: division by zero")


def test_without_time_a_section_is_skipped(tmp_path: Path) -> None:
    (found,) = run_kit(tmp_path, "works", minutes=0.01)["sections"]
    assert (found["status"], found["why"]) == ("skipped", "no time was left for it: give it --minutes")


def test_the_report_in_three_forms(tmp_path: Path) -> None:
    result = run_kit(tmp_path, "works", "fails")
    assert json.loads((tmp_path / report.NAMES["json"]).read_text("utf-8")) == json.loads(
        json.dumps(result, default=str)
    )
    markdown = (tmp_path / report.NAMES["markdown"]).read_text("utf-8")
    assert "| <all> \\| well | 4 |  |" in markdown
    assert "1 ok, 1 failed, 0 skipped" in markdown
    page = Balanced()
    page.feed((tmp_path / report.NAMES["html"]).read_text("utf-8"))
    assert page.open == []
    for text in ("<all> | well", "a remark\nof two lines", "seven is not eight", "emulated", torch.__version__):
        assert text in page.text


def test_sections_are_chosen_by_name() -> None:
    assert chosen(None) == SECTIONS
    assert [found.name for found in chosen(["speed", "ends"])] == ["ends", "speed"]
    with pytest.raises(ConfigError, match="did you mean 'speed'"):
        chosen(["sped"])


def test_a_setting_survives_its_way_to_the_section() -> None:
    for minutes in (3.0, 9.0):
        for name in ("emulated", "cuda:0"):
            setting = setting_for(name, "measured on a card", minutes)
            assert Setting.from_json(setting.to_json()) == setting


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a card")
def test_without_a_card_the_message_says_what_to_do() -> None:
    with pytest.raises(DeviceError, match=r"no accelerator to check: .* --accelerator emulated"):
        device_name(None)
    with pytest.raises(DeviceNotFoundError, match="'cuda:0' does not exist on this machine"):
        device_name("cuda:0")


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"

    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            sleep(seconds)  # of what other tests have left to do, such as moves onto huge pages
        elif log.read_text().strip():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(child.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            child.run_child([sys.executable, "-c", code], 30.0, log)
    left = int(log.read_text())
    deadline = time.monotonic() + 60.0
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(left).status() != psutil.STATUS_ZOMBIE:  # A signal works when the process next runs.
            assert time.monotonic() < deadline
            time.sleep(0.01)


# Profiles -------------------------------------------------------------------------------------------------------------


def test_a_trace_is_read_into_spans_and_calls() -> None:
    def event(category: str, name: str, start: float, took: float, **arguments: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": took, "args": arguments}

    seen = read_trace([
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        event("cuda_driver", "cuLaunchKernelEx", 5, 3),
        event("cuda_runtime", "cudaStreamSynchronize", 50, 40),
        event("kernel", "up_kernel", 10, 10, stream=7),
        event("kernel", "up_kernel", 15, 10, stream=7),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 40, stream=13, bytes=1000),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 90, 1, stream=7, bytes=8),
        event("user_annotation", CPU_LANE, 30, 20),
        event("user_annotation", WAIT, 60, 7),
        event("cpu_op", "aten::add", 0, 1),
        {"ph": "M", "name": "process_name"},
    ])  # fmt: skip
    assert (seen.called("launches"), seen.called("waits of the host"), seen.spent_us("launches")) == (2, 2, 8)
    assert busy_us(seen.kernels) == 15
    assert both_us(seen.kernels, seen.copies["HtoD"]) == 5
    assert both_us(seen.cpu_lane, seen.copies["HtoD"]) == 20
    assert begun_while(seen.cpu_lane, seen.copies["HtoD"]) == 1
    assert begun_while(seen.copies["DtoH"], seen.kernels) == 0
    assert seen.streams == {"kernels": {7}, "HtoD": {13}, "DtoH": {7}}
    assert seen.copied_bytes == {"HtoD": 1000, "DtoH": 8}


def test_the_cpu_lane_is_seen_by_the_profiler(small: Setting) -> None:
    with models.opened(small, "emulated", "int4", policy="cpu_only/none/lru", share=0.25) as generator:
        ids = models.prompt(small)
        seen = profile(lambda: models.forced_logits(generator, ids, ids[:2]))
    assert len(seen.cpu_lane) == 3 * small.layers
    assert busy_us(seen.cpu_lane) > 0


# On a fake card -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> Setting:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))
    return Setting(
        CARD, "counted on the fake device", smaller=SMALL_MODEL, dtypes=("int4",), policies=("on_demand/none/lru",),
        shares=(0.25, 1.0), prompt_tokens=12, long_prompt_tokens=48, new_tokens=3,
    )  # fmt: skip


def run_here(run: Callable[..., None], setting: Setting) -> dict[str, Any]:
    result = run_section(run, setting, Findings())
    assert result["status"] == "ok", result
    return result["tables"]


def test_parity_on_a_fake_card(small: Setting) -> None:
    with fake_cards(1):
        tables = run_here(parity.run, replace(small, dtypes=("float32",), shares=(0.5,)))
    (row,) = tables["logits against the CPU's"]
    assert row["tokens_equal"] == "4 of 4"
    assert row["least_cosine_of_steps"] > 0.99999
    (row,) = tables["hybrimoe.inject of a model that is on the device"]
    assert row["injected_cosine"] > 0.998


def test_a_lost_copy_on_a_fake_card(small: Setting) -> None:
    with fake_cards(1):
        tables = run_here(lost_copy.run, small)
    assert [row["failures_counted"] for row in tables["failing copies"]] == [1, 2, 3]


def test_memory_on_a_fake_card(small: Setting) -> None:
    with fake_cards(1, workspace_bytes=8_519_680):
        tables = run_here(memory.run, small)
    parts = ("dense", "slots", "workspaces", "graphs", "kv", "unpack", "reserve")
    for number, (row, planned) in enumerate(zip(tables["MiB"], tables["MiB planned"], strict=True)):
        assert planned["workspaces"] > 8.0
        taken = parts[: 3 if number == 0 else 2]  # a workspace stays once it is there
        assert row["driver_idle"] == pytest.approx(sum(planned[name] for name in taken), abs=1.0)
        assert row["planned"] == pytest.approx(sum(planned[name] for name in parts), abs=1.0)


def test_out_of_memory_on_a_fake_card(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_memory, "LEFT_FREE_BYTES", 100 << 10)
    with fake_cards(1, card_bytes=256 << 20):
        tables = run_here(no_memory.run, small)
    (row,) = tables["a prompt while the memory is taken"]
    assert row["slots_after"] < row["slots_before"], "slots made room"
    assert "out of memory" in row["told"], "a tiny model's slots are too small to make enough room"
    (row,) = tables["the same prompt afterwards"]
    assert row["largest_difference"] < 0.01


def test_calls_are_counted_on_a_fake_card(small: Setting) -> None:
    with fake_cards(1) as cards:
        tables = run_here(lambda setting, findings: overlap.run(setting, findings, counted(cards)), small)
    calls = {row["kind"]: row for row in tables["calls of the runtime"] if "25%" in row["what"]}
    assert calls["waits of the host"]["a_token"] >= 1
    assert calls["launches"]["a_layer"] > 1


def counted(cards: Cards) -> Callable[[Callable[[], object]], Seen]:
    """The fake device's own counts under the names of CUDA's calls."""
    names = {"waits": "cudaStreamSynchronize", "launches": "cudaLaunchKernel", "copy to the card": "cudaMemcpyAsync"}

    def watch(work: Callable[[], object]) -> Seen:
        cards.counts.clear()
        work()
        seen = Seen()
        for ours, theirs in names.items():
            seen.calls[theirs] += cards.counts[ours]
        return seen

    return watch


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "a line of the program"
echo "========= Invalid read: the first error"
for i in $(seq 1000); do echo "=========     Host Frame: a later error with a long stack of frames, line $i"; done
echo "========= ERROR SUMMARY: 12 errors"
exit 86
"""


def test_the_first_errors_of_a_sanitizer_are_told(tmp_path, monkeypatch):
    """Later ones follow from them, and there are more than a report holds."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setattr(races, "TOOLS", {"memcheck": ("transformers", {})})
    monkeypatch.setattr(races.shutil, "which", lambda name: str(tool))
    findings = Findings()
    races.run(Setting("cuda:0", ""), findings)
    (problem,), (remark,) = findings.problems, findings.remarks
    assert "12 errors" in problem
    assert remark.startswith("========= Invalid read: the first error")
    assert len(remark.splitlines()) == races.TOLD_LINES
