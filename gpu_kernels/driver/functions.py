"""The functions of a device's driver, by address: compiled code calls them without Python.

Of NVIDIA's driver (libcuda, whose functions are documented as the CUDA Driver API). Streams and graphs are torch's,
events are the driver's own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gpu_kernels.errors import DriverError
from gpu_kernels.graphs import Graph, RecordsGraphs, graphs_of
from gpu_kernels.waiting import wait_for_stream

(LAUNCH, QUERY_STREAM, QUERY, RECORD, AWAIT, COPY, ELAPSED, N_FUNCTIONS) = range(8)
"""Places of `Driver.addresses`: C functions of integers and addresses that return an error number.

LAUNCH(graph, stream); QUERY_STREAM(stream) and QUERY(event): 0 once all before it has ended, else NOT_READY;
RECORD(event, stream); AWAIT(stream, event, 0): what follows on the stream waits; COPY(to, from, bytes, stream): from
page-locked memory of the host; ELAPSED(address of a float32 of milliseconds, event, event)."""
NOT_READY = 600
"""CUDA_ERROR_NOT_READY."""
NAMES = {
    LAUNCH: "cuGraphLaunch", QUERY_STREAM: "cuStreamQuery", QUERY: "cuEventQuery", RECORD: "cuEventRecord",
    AWAIT: "cuStreamWaitEvent", COPY: "cuMemcpyHtoDAsync_v2", ELAPSED: "cuEventElapsedTime",
}  # fmt: skip
LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
SWITCH = "HYBRIMOE_TOKEN_LOOP"
TRIAL_BYTES = 4096


class Driver(Protocol):
    """A device's functions. addresses int64 [N_FUNCTIONS]."""

    addresses: npt.NDArray[np.int64]

    def stream(self, stream: torch.Stream | None) -> int:
        """How the functions name a stream of torch's; None: the current one. Raises DriverError."""

    def graph(self, graph: Graph) -> int:
        """How they name a recorded graph. Raises DriverError."""

    def new_event(self) -> int:
        """An event that tells times. Raises DriverError."""

    def free_event(self, event: int) -> None:
        """Gives an event back."""

    def call(self, function: int, *arguments: int) -> int:
        """Calls a function from Python; its error number."""

    def told(self, code: int) -> str:
        """What an error number means."""


class CudaDriver:
    """NVIDIA's. Raises DriverError where its library, or one of the functions, is missing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self._library = ctypes.CDLL(LIBRARY)
            self._functions = {place: getattr(self._library, name) for place, name in NAMES.items()}
        except (OSError, AttributeError) as error:
            raise DriverError(f"the driver's functions were not found: {error}") from error
        self.addresses = np.zeros(N_FUNCTIONS, np.int64)
        for place, function in self._functions.items():
            self.addresses[place] = ctypes.cast(function, ctypes.c_void_p).value or 0

    def stream(self, stream: torch.Stream | None) -> int:
        """As `Driver.stream`."""
        if stream is None:
            return int(torch.cuda.current_stream(self._device).cuda_stream)
        named = torch.cuda.Stream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )
        return int(named.cuda_stream)

    def graph(self, graph: Graph) -> int:
        """As `Driver.graph`."""
        handle = getattr(graph, "raw_cuda_graph_exec", None)
        if handle is None:
            raise DriverError(f"torch {torch.__version__} does not tell how the driver names a graph")
        return int(handle())

    def new_event(self) -> int:
        """As `Driver.new_event`."""
        event = ctypes.c_void_p()
        self._check(self._library.cuEventCreate(ctypes.byref(event), 0))
        return int(event.value or 0)

    def free_event(self, event: int) -> None:
        """As `Driver.free_event`."""
        self._library.cuEventDestroy_v2(ctypes.c_void_p(event))

    def call(self, function: int, *arguments: int) -> int:
        """As `Driver.call`."""
        return int(self._functions[function](*map(ctypes.c_void_p, arguments)))

    def told(self, code: int) -> str:
        """As `Driver.told`."""
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(code, ctypes.byref(text)) or not text.value:
            return f"error {code} of the driver"
        return f"{text.value.decode(errors='replace')} (error {code} of the driver)"

    def _check(self, code: int) -> None:
        if code:
            raise DriverError(self.told(code))


def driver_of(device: torch.device) -> Driver:
    """The driver of a device, tried out. Raises DriverError, with the reason, where compiled code cannot use it."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "no", "false"):
        raise DriverError(f"{SWITCH} switches it off")
    if device.type != "cuda" or torch.version.hip is not None:
        raise DriverError(f"only NVIDIA's driver is called by compiled code, this is {device}")
    graphs = graphs_of(device)
    if graphs is None:
        raise DriverError(f"torch records no graphs on {device}")
    with torch.accelerator.device_index(device.index):
        driver = CudaDriver(device)
        try_out(driver, device, graphs)
    return driver


def try_out(driver: Driver, device: torch.device, graphs: RecordsGraphs) -> None:
    """Copies some bytes, launches a graph behind the copy and asks for the ends, by the driver's functions. Raises
    DriverError where that gives something else than torch does, and LostError where it does not end."""
    sent = torch.empty(TRIAL_BYTES, dtype=torch.uint8, pin_memory=True)
    sent.copy_(torch.arange(TRIAL_BYTES) % 251)
    landed = torch.zeros(TRIAL_BYTES, dtype=torch.uint8, device=device)
    computed = landed + 1  # a kernel is loaded on its first use, which no recording allows
    with graphs.recording():
        graphs.begin()
        torch.add(landed, 1, out=computed)
        graph = graphs.end()
    # A recording leaves nothing under way, so that the copy has nothing to wait for.
    stream, events = torch.Stream(device), [driver.new_event(), driver.new_event()]
    named, computes, milliseconds = driver.stream(stream), driver.stream(None), np.zeros(1, np.float32)
    calls: list[tuple[int, tuple[int, ...]]] = [
        (RECORD, (events[0], named)), (COPY, (landed.data_ptr(), sent.data_ptr(), TRIAL_BYTES, named)),
        (RECORD, (events[1], named)), (AWAIT, (computes, events[1], 0)), (LAUNCH, (driver.graph(graph), computes)),
    ]  # fmt: skip
    try:
        for function, arguments in calls:
            require(driver, driver.call(function, *arguments))
        wait_for_stream(device, "a first copy and a first graph by the driver")
        for function, argument in ((QUERY, events[1]), (QUERY_STREAM, named), (QUERY_STREAM, computes)):
            require(driver, driver.call(function, argument))
        require(driver, driver.call(ELAPSED, milliseconds.ctypes.data, *events))
    finally:
        for event in events:
            driver.free_event(event)
    if milliseconds[0] < 0.0 or not torch.equal(landed.cpu(), sent):
        raise DriverError("a copy by the driver's functions gave other bytes than were sent")
    if not torch.equal(computed.cpu(), sent + 1):
        raise DriverError("a graph launched by the driver's functions computed something else than was recorded")


def require(driver: Driver, code: int) -> None:
    """Raises DriverError for an error number."""
    if code:
        raise DriverError(driver.told(code))
