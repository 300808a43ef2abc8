"""A session on one device whose experts are split between CPU and slots: its layers' calls in recorded steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpu_kernels.engine.routed import FLOATS
from gpu_kernels import TorchAccelerator
from gpu_kernels.driver.functions import Driver, driver_of
from gpu_kernels.errors import DriverError
from gpu_kernels.exchange import Exchange
from gpu_kernels.graphs import Graph
from hybrimoe.runtime.layer_call.call import ExpertsCall
from hybrimoe.runtime.layer_call.sent import SentCall
from hybrimoe.runtime.startup.units import Unit
from hybrimoe.runtime.token_loop.loop import NoLoopError, TokenLoop, make_ready, require_loop

Shape = tuple[int, int, int, torch.dtype, torch.dtype]
"""Tokens, experts of a token, width; dtypes of hidden states and of weights."""


class ExchangedExperts:
    """What host and device hand each other at the layers of a step, by one exchange for each shape of calls. Valid as
    long as `Session.exchanged` gives it."""

    def __init__(self, runner: ExpertsCall, accelerator: TorchAccelerator) -> None:
        self.runner, self.accelerator = runner, accelerator
        self._exchanges: dict[Shape, Exchange] = {}
        self._driver: Driver | str | None = None
        """Or the reason why there is none."""

    def takes(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> bool:
        """Whether calls of a layer with such tensors can be sent: of few tokens, on the device, without a norm over the
        experts' outputs."""
        known = self.runner.layers[layer]
        return (
            known.transform() is None
            and all(tensor.device == self.accelerator.device for tensor in (hidden, ids, weights))
            and ids.dtype is torch.int64
            and ids.dim() == 2
            and ids.shape == weights.shape
            and hidden.dtype in FLOATS
            and weights.dtype in FLOATS
            and hidden.numel() == len(ids) * known.spec.hidden
        )

    def send(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Exchange:
        """Submits the copies of a call's tensors to the host; the exchange that they fill. Raises GraphError."""
        (n_tokens, top_k), width = ids.shape, hidden.shape[-1]
        shape = n_tokens, top_k, width, hidden.dtype, weights.dtype
        exchange = self._exchanges.get(shape)
        if exchange is None:
            exchange = self._exchanges[shape] = self.accelerator.exchange(*shape)
        exchange.send(hidden, ids, weights)
        return exchange

    def compute(self, layer: int, exchange: Exchange, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        """Submits the work of the layer's experts that have slots, as the exchange then says."""
        self.accelerator.compute_exchanged(self.runner.layers[layer].spec, exchange, hidden, weights)

    def combine(self, exchange: Exchange, hidden: torch.Tensor) -> torch.Tensor:
        """Submits the sum of the rows of both; the output, in shape and dtype of `hidden`."""
        return self.accelerator.combine_exchanged(exchange).view(hidden.shape)

    @property
    def has_slots(self) -> bool:
        """Whether there is anything for `compute` to do."""
        return self.accelerator.n_slots > 0

    def sent_call(
        self, layer: int, exchange: Exchange, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
        graph: Graph | None,
    ) -> SentCall:  # fmt: skip
        """A call as it was recorded, for `Session.run_sent`."""
        return SentCall(self.runner, layer, self.accelerator, exchange, hidden, ids, weights, graph)

    def loop_over(self, graphs: Sequence[Graph], calls: Sequence[SentCall]) -> TokenLoop:
        """The compiled loop over recorded pieces and the calls between them. Raises NoLoopError or DriverError with the
        reason where Python runs between them."""
        return TokenLoop(self.runner, self.accelerator, self._opened_driver(), graphs, calls)

    def why_no_loop(self) -> str | None:
        """Why Python runs between the pieces of steps, whatever they are; None where compiled code can, which is ready
        then."""
        try:
            require_loop(self.runner, self.accelerator)
            self._opened_driver()
        except (NoLoopError, DriverError) as error:
            return str(error)
        make_ready()
        return None

    def _opened_driver(self) -> Driver:
        """Asked for once: what has been told of it stays so."""
        if self._driver is None:
            try:
                self._driver = driver_of(self.accelerator.device)
            except DriverError as error:
                self._driver = str(error)  # the error itself would keep what its callers were at work on
        if isinstance(self._driver, str):
            raise DriverError(self._driver)
        return self._driver


def find_exchanged(runner: ExpertsCall, units: Sequence[Unit]) -> ExchangedExperts | None:
    """The experts of all layers where one torch device has the slots, and what they hold are whole records."""
    if len(units) != 1 or any(queue.prepares for queue in runner.experts.lanes.queues):
        return None
    accelerator = units[0].accelerator
    return ExchangedExperts(runner, accelerator) if isinstance(accelerator, TorchAccelerator) else None
