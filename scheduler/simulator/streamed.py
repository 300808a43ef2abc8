"""Layers of a streamed prompt in simulated time: the link fills a buffer, the accelerator computes everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.demand import LayerDemand
from scheduler.records import TaskRecord
from scheduler.simulator.engine import Engine
from scheduler.streaming import Streaming

Ints = NDArray[np.integer]


@dataclass(slots=True)
class Streamer:
    """Carries the layers of one prompt after another. ``free_us``: when the buffer for the next upload is free;
    ``_ready_us``: when the upload that was begun ahead ends."""

    streaming: Streaming
    engine: Engine
    free_us: float = 0.0
    _begun: int = -1
    _ready_us: float = 0.0

    def takes(self, demand: LayerDemand) -> bool:
        """Whether a layer of these tokens is streamed."""
        return demand.phase == "prefill" and demand.n_tokens_total >= self.streaming.min_tokens

    def begin_step(self) -> None:
        """A step starts: nothing has been uploaded ahead."""
        self._begun, self.free_us = -1, self.engine.now_us

    def run(self, demand: LayerDemand, absent: NDArray[np.bool_], following: Ints, shared_us: float, step: int) -> int:
        """One layer, from now on. ``absent`` bool [experts]: those without a slot; ``following``: those of the next
        layer, empty behind the last one. Returns how many experts were uploaded for this layer."""
        engine, layer, began_us = self.engine, demand.layer, self.engine.now_us
        wanted = np.flatnonzero(absent) if self.streaming.ahead else demand.expert_ids[absent[demand.expert_ids]]
        if self._begun != layer:
            self._ready_us = self._upload(layer, wanted, max(began_us, self.free_us), step)
        start_us = max(self._ready_us, began_us + shared_us)
        self.free_us = start_us
        each_us = engine.costs.accel_us(layer, demand.n_tokens)
        if self.streaming.ahead and following.size:
            self._begun = layer + 1
            self._ready_us = self._upload(layer + 1, following, start_us, step)
        engine.now_us = start_us + float(each_us.sum())
        engine.busy.accel += shared_us + float(each_us.sum())
        if engine.keep_records:
            self._record(demand, each_us, start_us, began_us, shared_us, step)
        return int(wanted.size)

    def _upload(self, layer: int, experts: Ints, from_us: float, step: int) -> float:
        """The end of an upload, which begins when the link has carried what was on it."""
        engine = self.engine
        each_us = engine.costs.transfer_us(layer)
        at_us = from_us + engine.link_ready_us()
        engine.busy.link += each_us * experts.size
        engine.busy.link_bytes += engine.expert_bytes * int(experts.size)
        for expert in experts.tolist() if engine.keep_records else ():
            engine.records.append(
                TaskRecord("link", "transfer", layer, expert, 0, engine.expert_bytes, at_us, at_us + each_us, step)
            )
            at_us += each_us
        return at_us if engine.keep_records else at_us + each_us * experts.size

    def _record(
        self, demand: LayerDemand, each_us: NDArray[np.float64], start_us: float, began_us: float, shared_us: float,
        step: int,
    ) -> None:  # fmt: skip
        records, layer = self.engine.records, demand.layer
        if shared_us > 0.0:
            end_us = began_us + shared_us
            records.append(TaskRecord("accel", "shared_expert", layer, -1, 0, 0, began_us, end_us, step))
        ends = start_us + np.cumsum(each_us)
        for expert, n_tokens, us, end_us in zip(
            demand.expert_ids.tolist(), demand.n_tokens.tolist(), each_us.tolist(), ends.tolist(), strict=True
        ):
            records.append(TaskRecord("accel", "accel_expert", layer, expert, n_tokens, 0, end_us - us, end_us, step))
