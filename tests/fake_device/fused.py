"""A stand-in for the Triton kernels: right values, launched as Triton launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cpu_kernels import ExpertSpec, reference_ffn, unpack_expert
from cpu_kernels.format.layout import is_quantised
from gpu_kernels.fused_choice import FusedChoice
from tests.fake_device.tensors import DeviceTensor


@dataclass(frozen=True)
class FakeCut:
    """As `gpu_kernels.triton.cuts.Cuts`."""

    label: str
    single: bool = False


class StreamedKernels:
    """What `gpu_kernels.fused_choice.FusedModule` asks for. Kernels go to the current card's current stream, wherever
    their tensors are: Triton's launcher knows no device guard."""

    MAX_TOKENS = 16

    def __init__(self, cards: Any) -> None:
        self._cards = cards

    def choice(self) -> FusedChoice:
        """What `gpu_kernels.fused_choice.load_fused` gives where Triton is installed."""
        return FusedChoice(self, self.combine)

    def supports(self, spec: ExpertSpec) -> bool:
        """True: values come from the reference."""
        return True

    def block_tokens(self, n_tokens: list[int]) -> int:
        """One kernel for all numbers of tokens."""
        return self.MAX_TOKENS

    def candidates(self, spec: ExpertSpec, block: int, device: torch.device) -> tuple[FakeCut, ...]:
        """One of several launches and one of a single launch."""
        return FakeCut("several"), FakeCut("one launch", single=True)

    def new_state(self, device: torch.device) -> torch.Tensor:
        """See `gpu_kernels.triton.fused.new_state`."""
        return torch.zeros(1, dtype=torch.int32, device=device)

    def run_group(
        self, spec: ExpertSpec, slots: torch.Tensor, slot_ids: torch.Tensor, offsets: torch.Tensor,
        rows: torch.Tensor, n_tokens: list[int], hidden: torch.Tensor, weights: torch.Tensor, top_k: int,
        out: torch.Tensor, prepared: dict[ExpertSpec, torch.Tensor] | None = None, most: int | None = None,
        cuts: FakeCut | None = None, state: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Computes the group's rows into `out`; see `gpu_kernels.triton.fused.run_group`."""
        if prepared is not None:
            prepared.setdefault(spec, hidden)
        assert cuts is None or not cuts.single or state is not None, "programs that wait need counters"
        with self._cards.noting_whole():
            n_rows = n_tokens if most is None else offsets.inner.diff().tolist()  # type: ignore[attr-defined]
            assert most is None or max(n_rows) <= most, "no program is launched for the others"
            self._run_group(spec, slots, slot_ids, offsets, rows, n_rows, hidden, weights, top_k, out)
        if self._cards.noted is not None:
            again = partial(
                self.run_group, spec, slots, slot_ids, offsets, rows, n_tokens, hidden, weights, top_k, out, most=most
            )  # fmt: skip
            self._cards.noted.append((again, None, "fused group"))

    def combine(
        self, rows: torch.Tensor, host_rows: torch.Tensor | None, source: torch.Tensor | None, top_k: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """Each token's rows added; see `gpu_kernels.triton.combine.combine`."""
        with self._cards.noting_whole():
            out = self._combine(rows, host_rows, source, top_k, dtype)
        if self._cards.noted is not None:
            again = partial(self.combine, rows, host_rows, source, top_k, dtype)
            self._cards.noted.append((again, out, "fused combine"))
        return out

    def _run_group(
        self, spec: ExpertSpec, slots: torch.Tensor, slot_ids: torch.Tensor, offsets: torch.Tensor,
        rows: torch.Tensor, n_tokens: list[int], hidden: torch.Tensor, weights: torch.Tensor, top_k: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        tensors: list[DeviceTensor] = [slots, slot_ids, offsets, rows, hidden, weights, out]  # type: ignore[list-item]
        inner = [tensor.inner for tensor in tensors]
        at = int(inner[2][0])
        used = []
        for slot, n in zip(inner[1].tolist(), n_tokens, strict=True):
            part = inner[3][at : at + n]
            at += n
            if slot < 0:
                continue
            record = unpack_expert(spec, inner[0][slot, : spec.record_bytes])
            inner[6][part] = reference_ffn(spec, record, inner[4][part // top_k]) * inner[5][part].unsqueeze(1)
            used.append(slots[slot])
        reads = [*used, *tensors[1:6]]
        if is_quantised(spec.dtype):
            self._cards.launch_unguarded("fused prepare", [tensors[4]], [])
        self._cards.launch_unguarded("fused up", reads, [])
        self._cards.launch_unguarded("fused down", reads, [out])

    def _combine(
        self, rows: torch.Tensor, host_rows: torch.Tensor | None, source: torch.Tensor | None, top_k: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        n_tokens = len(rows) // top_k
        out: DeviceTensor = torch.empty(  # type: ignore[assignment]
            (n_tokens, rows.shape[1]), dtype=dtype, device=rows.device
        )
        given = [part for part in (rows, host_rows, source) if part is not None]
        reads = [part for part in given if isinstance(part, DeviceTensor)]
        inner = [part.inner if isinstance(part, DeviceTensor) else part for part in given]
        every = inner[0].clone()
        if source is not None:
            sent = inner[2] >= 0
            every[sent] = inner[1][inner[2][sent].long()]
        total = torch.zeros(out.shape)
        for j in range(top_k):
            total += every.view(n_tokens, top_k, -1)[:, j]
        out.inner.copy_(total)
        tick = self._cards.launch_unguarded("fused combine", reads, [out])
        self._cards.reads_host(self._cards.stream(), tick, given)
        return out
