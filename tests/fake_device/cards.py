"""The cards themselves: streams, memory, counts, findings; and how torch comes to see them."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
import time
import types
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import pytest
import torch

import gpu_kernels.fused_choice
import gpu_kernels.torch_accelerator
import gpu_kernels.waiting
import hybrimoe.config.values
import hybrimoe.runtime.exchanged
import hybrimoe.runtime.startup.budget
from gpu_kernels.driver.queued import QueuedCopy
from gpu_kernels.waiting import WaitLimit
from tests.fake_device.driver import FakeDriver
from tests.fake_device.fused import StreamedKernels
from tests.fake_device.memory import POISON_BYTE, extent
from tests.fake_device.streams import FakeEvent, FakeStream, HostClock, ManualClock, Ticks, join
from tests.fake_device.tensors import DeviceTensor, Operations

if not hasattr(torch._C, "_acc"):
    pytest.skip("fake cards need a device guard in Python, which torch 2.8 has not", allow_module_level=True)

DEVICE_TYPE = "privateuseone"
LAUNCH_US = 2.0
OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""
ASKERS = ("/hybrimoe/", "/gpu_kernels/", "/cpu_kernels/", "/transformers/")
"""In the paths of files whose functions are told apart in `Cards.sites`."""
Noted = tuple[Callable[[], Any], Any, str]
"""What runs an operation again, what it gave when it was recorded, its name."""
DEFAULT_CARD_BYTES = 4 << 30
DEFAULT_LINK_GBPS = 8.0


@dataclass(slots=True)
class _Kept:
    """Page-locked bytes that a copy may still read: they must not change before the host knows that it has ended."""

    stream: int
    tick: int
    source: torch.Tensor
    checksum: int


@dataclass(slots=True)
class _Delivery:
    """Values that a copy brings to page-locked memory at a time that only an event tells."""

    stream: int
    tick: int
    target: torch.Tensor
    values: torch.Tensor


@dataclass(slots=True)
class _Card:
    device: torch.device
    current: FakeStream | None = None
    used_bytes: int = 0
    peak_bytes: int = 0
    lost: str | None = None


@dataclass
class Cards:
    """Some cards of `card_bytes` each.

    refuses_locking: host memory cannot be locked by the runtime. workspace_bytes: what is taken on each stream, and
    while graphs are recorded, for products of matrices. findings: what a real card would have punished.
    counts: launches, copies, waits of the host by reason. sites: the same by the function that asked for them, as
    "file.py:function: what". locked: address -> bytes that the runtime was told to lock. noted: what is being recorded
    into a graph.
    """

    n: int
    card_bytes: int = DEFAULT_CARD_BYTES
    link_gbps: float = DEFAULT_LINK_GBPS
    refuses_locking: bool = False
    workspace_bytes: int = 0
    clock: HostClock | ManualClock = field(default_factory=HostClock)
    findings: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sites: Counter[str] = field(default_factory=Counter)
    host: Ticks = field(default_factory=dict)
    index: int = 0
    bytes_to_host: int = 0

    def __post_init__(self) -> None:
        self._streams: list[FakeStream] = []
        self._pinned: list[torch.Tensor] = []
        self.locked: dict[int, int] = {}
        self.addressed: WeakValueDictionary[int, DeviceTensor] = WeakValueDictionary()
        """Tensors whose addresses were asked for."""
        self._kept: list[_Kept] = []
        self._deliveries: list[_Delivery] = []
        self._planned: set[tuple[torch.Size, ...]] = set()
        self.noted: list[Noted] | None = None
        self.is_recording = False
        self._workspaces: set[tuple[int, bool]] = set()
        self._cards = [_Card(torch.device(DEVICE_TYPE, index)) for index in range(self.n)]
        for card in self._cards:
            card.current = FakeStream(card.device, cards=self)

    # Devices and streams -----------------------------------------------------------------------------------------

    def device(self, device: torch.device | str | int | None) -> torch.device:
        """With an index; None and a device without one mean the current card. Raises RuntimeError beyond the last."""
        if isinstance(device, int):
            if 0 <= device < self.n:
                return self._cards[device].device
            device = torch.device(DEVICE_TYPE, device)
        found = torch.device(DEVICE_TYPE, self.index) if device is None else torch.device(device)
        index = self.index if found.index is None else found.index
        if found.type != DEVICE_TYPE or not 0 <= index < self.n:
            raise RuntimeError(f"{found} is not one of the {self.n} cards")
        return self._cards[index].device

    def has(self, device: object) -> bool:
        """True for what names a card."""
        return device is not None and torch.device(device).type == DEVICE_TYPE  # type: ignore[arg-type]

    def register(self, stream: FakeStream) -> int:
        """The number of a new stream."""
        self._streams.append(stream)
        return len(self._streams) - 1

    def stream(self, device: torch.device | str | int | None = None) -> FakeStream:
        """A card's current stream."""
        found = self._cards[self.device(device).index].current
        assert found is not None
        return found

    def set_stream(self, stream: FakeStream) -> FakeStream:
        """Makes a stream current, and its card; returns the one that was current before on the current card."""
        before = self.stream(stream.device)
        self._cards[stream.device.index].current = stream
        return before

    def synchronize(self, device: torch.device | str | int | None = None) -> None:
        """The host waits for all streams of a card."""
        self.note("device waits")
        self.require(self.device(device))
        for stream in [stream for stream in self._streams if stream.device == self.device(device)]:
            stream.block_host()

    def lose(self, index: int, reason: str = "CUDA error: unspecified launch failure") -> None:
        """The card fails as a whole: whatever is asked of it from here on raises what torch raises."""
        self._cards[index].lost = reason

    def require(self, device: torch.device) -> None:
        """Raises torch.AcceleratorError where the card is lost."""
        reason = self._cards[device.index].lost
        if reason is not None:
            raise torch.AcceleratorError(reason)

    def wait_until(self, device: torch.device, us: float) -> None:
        """The host waits for a time of a card, by a call that it cannot leave. Raises AssertionError where the card
        hangs: the program would never go on."""
        self.require(device)
        assert us < math.inf, f"{_asker()} waits for ever: {device} hangs"
        self.clock.wait_until(us)

    def pause(self, awaited: FakeStream | FakeEvent | QueuedCopy, seconds: float) -> None:
        """Stands for `gpu_kernels.waiting.pause`: where the time does not go by itself, it goes on to the awaited
        end."""
        if isinstance(awaited, QueuedCopy):
            driver = awaited.queue.driver
            assert isinstance(driver, FakeDriver)
            awaited = driver.end_of(awaited)
        end_us = awaited.end_us if isinstance(awaited, FakeStream) else awaited.at_us
        if isinstance(self.clock, ManualClock) and end_us < math.inf:
            self.clock.wait_until(end_us)
        else:
            time.sleep(seconds)

    # Memory ------------------------------------------------------------------------------------------------------

    def allocate(self, device: torch.device, n_bytes: int) -> None:
        """Takes bytes of a card. Raises torch.OutOfMemoryError."""
        card = self._cards[device.index]
        if card.used_bytes + n_bytes > self.card_bytes:
            raise torch.OutOfMemoryError(
                f"{n_bytes} bytes on {device}: {card.used_bytes} of {self.card_bytes} are in use"
            )
        card.used_bytes += n_bytes
        card.peak_bytes = max(card.peak_bytes, card.used_bytes)

    def multiply(self, stream: FakeStream) -> None:
        """A product of matrices: the first one of a stream takes a workspace that stays. What is recorded runs on a
        stream of its own."""
        if (stream.number, self.is_recording) not in self._workspaces:
            self._workspaces.add((stream.number, self.is_recording))
            self.allocate(stream.device, self.workspace_bytes)

    def free(self, device: torch.device, n_bytes: int) -> None:
        """Gives bytes back."""
        self._cards[device.index].used_bytes -= n_bytes

    def memory_info(self, device: torch.device | str | int | None = None) -> tuple[int, int]:
        """Free and total bytes of a card."""
        return self.card_bytes - self._cards[self.device(device).index].used_bytes, self.card_bytes

    def pin(self, tensor: torch.Tensor) -> None:
        """Notes host memory as page-locked."""
        self._pinned.append(tensor)

    def pinned(self, tensor: torch.Tensor) -> bool:
        """True for page-locked host memory."""
        at = tensor.untyped_storage().data_ptr() + extent(tensor)[0]
        ranges = [(held.untyped_storage().data_ptr(), held.untyped_storage().nbytes()) for held in self._pinned]
        return any(start <= at < start + n_bytes for start, n_bytes in (*ranges, *self.locked.items()))

    def used_bytes(self, index: int = 0) -> int:
        """Bytes of a card that are in use."""
        return self._cards[index].used_bytes

    def peak_bytes(self, index: int = 0) -> int:
        """The most bytes of a card that were in use at once."""
        return self._cards[index].peak_bytes

    # Work --------------------------------------------------------------------------------------------------------

    def launch(
        self, stream: FakeStream, what: str, reads: Sequence[DeviceTensor], writes: Sequence[DeviceTensor],
        duration_us: float = LAUNCH_US,
    ) -> int:  # fmt: skip
        """One operation of a stream; returns its tick."""
        self.note("launches")
        tick = stream.operate(duration_us)
        for tensor in reads:
            if not any(tensor is written for written in writes):
                tensor.memory.read(extent(tensor.inner), stream, tick, what)
        for tensor in writes:
            tensor.memory.write(extent(tensor.inner), stream, tick, what)
        return tick

    def launch_unguarded(self, what: str, reads: Sequence[DeviceTensor], writes: Sequence[DeviceTensor]) -> int:
        """A launch on the current card's current stream, whatever its tensors' card; returns its tick."""
        for tensor in (*reads, *writes):
            if tensor.device.index != self.index:
                self.report(f"{what} was launched on card {self.index} with memory of {tensor.device}")
        return self.launch(self.stream(self.index), what, reads, writes)

    def transfer(
        self, stream: FakeStream, what: str, n_bytes: int, reads: Sequence[DeviceTensor],
        writes: Sequence[DeviceTensor],
    ) -> int:  # fmt: skip
        """A copy over the link; returns its tick."""
        self.counts["launches"] -= 1
        self.note(what)
        return self.launch(stream, what, reads, writes, LAUNCH_US + n_bytes / (self.link_gbps * 1e3))

    def wait(self, stream: FakeStream, why: str) -> None:
        """The host waits for a stream inside an operation."""
        self.counts["waits"] += 1
        self.note(f"wait: {why}")
        stream.block_host()

    def note(self, what: str) -> None:
        """Counts something, in total and for the function that asked for it."""
        self.counts[what] += 1
        self.sites[f"{_asker()}: {what}"] += 1

    def plan_attention(self, shapes: tuple[torch.Size, ...]) -> None:
        """Attention of these shapes may be cuDNN's, which makes a plan for each that it has not seen."""
        if shapes not in self._planned:
            self._planned.add(shapes)
            self.note("attention plans")

    @contextlib.contextmanager
    def noting_whole(self) -> Iterator[None]:
        """Within the block nothing is noted: it is one operation of a graph."""
        noted, self.noted = self.noted, None
        try:
            yield
        finally:
            self.noted = noted

    def reads_host(self, stream: FakeStream, tick: int, memory: Sequence[torch.Tensor]) -> None:
        """An operation reads host memory itself: it must be page-locked, and stay as it is until the host knows that
        the operation has ended."""
        for tensor in memory:
            if not isinstance(tensor, DeviceTensor):
                if not self.pinned(tensor):
                    self.report("a kernel reads host memory that is not page-locked")
                self.keep_until(stream, tick, tensor)

    def keep_until(self, stream: FakeStream, tick: int, source: torch.Tensor) -> None:
        """The host must leave `source` as it is until it knows that the copy has ended."""
        self._kept.append(_Kept(stream.number, tick, source, _checksum(source)))

    def deliver(self, stream: FakeStream, tick: int, target: torch.Tensor, values: torch.Tensor) -> None:
        """`target` holds garbage until the host knows that the copy has ended."""
        target.view(torch.uint8).fill_(POISON_BYTE) if target.is_contiguous() else target.fill_(float("nan"))
        self._deliveries.append(_Delivery(stream.number, tick, target, values))

    def host_learns(self, seen: Ticks) -> None:
        """The host comes to know what has ended."""
        join(self.host, seen)
        for item in [item for item in self._kept if self.host.get(item.stream, 0) >= item.tick]:
            self._kept.remove(item)
            if _checksum(item.source) != item.checksum:
                self.report("page-locked memory was changed while a copy might still read it")
        for arrived in [item for item in self._deliveries if self.host.get(item.stream, 0) >= item.tick]:
            self._deliveries.remove(arrived)
            arrived.target.copy_(arrived.values)

    def report(self, finding: str) -> None:
        """Notes a misuse, once."""
        if finding not in self.findings:
            self.findings.append(finding)

    def check(self) -> None:
        """Raises AssertionError with everything found so far."""
        for stream in self._streams:
            if stream.end_us < math.inf and self._cards[stream.device.index].lost is None:
                stream.block_host()
        assert not self.findings, "\n".join(self.findings)


def _asker() -> str:
    """The innermost function of the project (tests aside) or of transformers that is being called."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = _name_of_asker(frame.f_code)
        if name is not None:
            return name
        frame = frame.f_back
    return "elsewhere"


@functools.cache
def _name_of_asker(code: types.CodeType) -> str | None:
    """As "file.py:function", or None for other code than that of ASKERS."""
    name = code.co_filename
    asks = any(part in name for part in ASKERS) and "/tests/" not in name
    return f"{name.rpartition('/')[2]}:{code.co_qualname}" if asks else None


class _DeviceIndex:
    """Stands for torch.accelerator.device_index."""

    def __init__(self, cards: Cards, index: int | None) -> None:
        self._cards, self._index, self._before = cards, index, cards.index

    def __enter__(self) -> None:
        self._before = self._cards.index
        if self._index is not None:
            self._cards.index = self._index

    def __exit__(self, *_: object) -> None:
        self._cards.index = self._before


class _Runtime:
    """Stands for the device's runtime as torch hands it out: locks pages of the host."""

    def __init__(self, cards: Cards) -> None:
        self._cards = cards

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        """0, or the runtime's error number."""
        if self._cards.refuses_locking:
            return OUT_OF_MEMORY
        self._cards.locked[address] = n_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """0."""
        self._cards.locked.pop(address)
        return 0


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


@functools.cache
def _install_guard() -> _Guard:
    """Lets torch's own code take the cards' type; does not make `torch.accelerator` find any. Once a process."""
    guard = _Guard()
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    return guard


_MODULE = types.ModuleType(f"torch.{DEVICE_TYPE}")
"""What torch looks for under `torch.<device type>`; one for all cards, because torch remembers it."""


def _describe_to_torch(cards: Cards) -> None:
    """Fills the cards' module."""
    entries: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: cards.n,
        "current_device": lambda: cards.index,
        "get_device_name": lambda device=None: "fake card",
        "mem_get_info": cards.memory_info,
        "cudart": lambda: _Runtime(cards),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
    }
    for name, value in entries.items():
        setattr(_MODULE, name, value)


@contextlib.contextmanager
def fake_cards(n: int = 1, **settings: Any) -> Iterator[Cards]:
    """`n` cards that torch sees, as `torch.accelerator` and in every operation of this thread; see `Cards`.

    Raises AssertionError at the end for what was found, unless the block failed by itself.
    """
    _install_guard()
    cards = Cards(n, **settings)
    _describe_to_torch(cards)
    accelerator: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: cards.n,
        "current_accelerator": lambda check_available=False: torch.device(DEVICE_TYPE),
        "current_device_index": lambda: cards.index,
        "set_device_index": lambda index: setattr(cards, "index", cards.device(index).index),
        "current_stream": cards.stream,
        "set_stream": cards.set_stream,
        "synchronize": cards.synchronize,
        "device_index": functools.partial(_DeviceIndex, cards),
        "get_memory_info": cards.memory_info,
    }
    kernels = StreamedKernels(cards)
    with contextlib.ExitStack() as stack:
        sys.modules[f"torch.{DEVICE_TYPE}"] = _MODULE
        stack.callback(sys.modules.pop, f"torch.{DEVICE_TYPE}")
        stack.enter_context(mock.patch.object(torch, DEVICE_TYPE, _MODULE, create=True))
        for name, value in accelerator.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, value))
        for name, kind in (("Stream", FakeStream), ("Event", FakeEvent)):
            stack.enter_context(mock.patch.object(torch, name, type(name, (kind,), {"cards": cards})))
        workspace = functools.partial(_workspace_of, cards)
        stack.enter_context(mock.patch.object(hybrimoe.runtime.startup.budget, "blas_workspace_bytes", workspace))
        stack.enter_context(mock.patch.object(hybrimoe.runtime.exchanged, "driver_of", return_value=FakeDriver(cards)))
        for user in (gpu_kernels.torch_accelerator, gpu_kernels.fused_choice):
            stack.enter_context(mock.patch.object(user, "load_fused", new=kernels.choice))
        stack.enter_context(mock.patch.object(WaitLimit, "wait", _counted(cards)))
        stack.enter_context(mock.patch.object(gpu_kernels.waiting, "pause", cards.pause))
        stack.enter_context(mock.patch.object(torch, "Generator", new=_Generator))
        # A wrapping tensor made in inference mode has no version counter, which torch's views then ask for.
        stack.enter_context(mock.patch.object(torch, "inference_mode", new=_without_gradient))
        names = re.compile(rf"{hybrimoe.config.values._DEVICE.pattern}|{DEVICE_TYPE}(?::\d+)?")
        stack.enter_context(mock.patch.object(hybrimoe.config.values, "_DEVICE", names))
        stack.enter_context(Operations(cards))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield cards
        cards.check()


def _counted(cards: Cards) -> Callable[[WaitLimit, Any, str], None]:
    """`WaitLimit.wait`, noted as a wait of the host by whoever asks for it."""
    wait = WaitLimit.wait

    def noted(limit: WaitLimit, awaited: Any, what: str) -> None:
        cards.note("host waits")
        wait(limit, awaited, what)

    return noted


def _workspace_of(cards: Cards, device: torch.device) -> int:
    """Stands for `gpu_kernels.devices.blas_workspace_bytes`."""
    return cards.workspace_bytes if cards.has(device) else 0


def _without_gradient(mode: bool = True) -> contextlib.AbstractContextManager[object]:
    """Stands for torch.inference_mode."""
    return torch.no_grad() if mode else contextlib.nullcontext()


_RealGenerator = torch.Generator


class _Generator(torch.Generator):
    """Stands for torch.Generator: a card draws the host's numbers."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:  # type: ignore[misc]
        return _RealGenerator("cpu" if torch.device(device).type == DEVICE_TYPE else device)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
