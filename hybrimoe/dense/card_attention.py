"""Attention on a card: torch's kernels that take any number of keys, in place of those that are made for one.

On Hopper and the data centre's Blackwell cards torch prefers cuDNN's attention, which has an execution plan for each
shape. A plan takes the host 20 to 40 ms to make, and every decode step has one key more than the step before: each
token would wait for a plan that no other token uses. A prompt, too, has a length that seldom comes again, and what
cuDNN's kernels gain in it is less than a plan takes. So within a model's calls cuDNN's attention is switched off; torch
then takes its flash or its memory-efficient kernels.
"""

from __future__ import annotations

import threading

import torch
from torch import nn

from hybrimoe.dense.calls import AroundCalls


class CudnnAttentionOff:
    """A context in which torch does not choose cuDNN's attention; it may be entered several times, by several threads.

    torch has one switch for the process: it is off as long as somebody is inside, and then as it was before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._before = 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


cudnn_attention_off = CudnnAttentionOff()


class CardAttention:
    """Enters `cudnn_attention_off` in the calls of a model that has weights on an accelerator."""

    def __init__(self, model: nn.Module) -> None:
        self.applies = any(weight.device.type not in ("cpu", "meta") for weight in model.parameters())
        self._calls = AroundCalls(model, _off_for) if self.applies else None

    def undo(self) -> None:
        """Takes the hooks out of the model."""
        if self._calls is not None:
            self._calls.undo()


def _off_for(n_tokens: int) -> CudnnAttentionOff:
    return cudnn_attention_off
