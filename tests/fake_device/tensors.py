"""Tensors that claim to be on a card, and what happens to each torch operation while cards are there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_device.memory import Memory, poison
from tests.fake_device.streams import FakeStream

aten = torch.ops.aten

READ_BY_HOST = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default}
"""The host waits for their value."""
SIZED_BY_DATA = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
"""The host waits for the size of their result."""
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Take index tensors of the host too, by a blocking copy, and boolean ones, by `nonzero`."""
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
"""Of matrices: torch's library takes a workspace for each stream."""
UNWRITTEN = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default}
ATTENTION_BY_PLAIN_OPERATIONS = 0
"""The answer to `_fused_sdp_choice`."""
NOTHING_SPECIAL = object()
"""In place of a result: it is an operation like most."""
DEVICE_ADDRESSES = 1 << 60
"""Where addresses on cards begin: beyond what a processor can read."""


class DeviceTensor(torch.Tensor):
    """A tensor on a card. `inner` holds its values on the host, `memory` the bytes that it is a view of."""

    inner: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor, device: torch.device, memory: Memory) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        made.inner, made.memory = inner, memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensor = next(leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, DeviceTensor))
        return Operations(tensor.memory.cards).run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """As torch's: a copy that the host waits for."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        """Of this card's memory: equal where tensors begin at one place, and never readable by the host. Who asks for
        it may hand it to the driver."""
        address = self.inner.data_ptr() + DEVICE_ADDRESSES
        self.memory.cards.addressed[address] = self
        return address

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:  # type: ignore[override]
        """As torch's: views of one memory are views of one copy of it."""
        cards, stream = self.memory.cards, self.memory.cards.stream(self.device.index)
        memory = memo.get(id(self.memory))
        if memory is None:
            memory = memo[id(self.memory)] = Memory(cards, stream, self.memory.n_bytes)
        made = memo[id(self)] = DeviceTensor(copy.deepcopy(self.inner, memo), self.device, memory)
        cards.launch(stream, "deepcopy", [self], [made])
        return made

    def record_stream(self, stream: FakeStream) -> None:  # type: ignore[override]
        """As torch's."""
        self.memory.record_stream(stream)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.inner}, device={self.device})"


class Operations(TorchDispatchMode):
    """Runs every torch operation of a `with` block: the cards' own, copies between devices, and the host's."""

    def __init__(self, cards: Any) -> None:
        super().__init__()
        self._cards = cards

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and torch's compiler takes seconds to import."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not types and self._cards.noted is None and func is not aten.is_pinned.default:
            if not kwargs:
                return func(*args)
            if not kwargs.get("pin_memory") and not self._cards.has(kwargs.get("device")):
                return func(*args, **kwargs)
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation; noted where a graph is being recorded, unless it only looks at memory in another way."""
        result, again = self._run(func, args, kwargs)
        if self._cards.noted is not None and not is_view(func):
            self._cards.noted.append((again, result, str(func)))
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Callable[[], Any]]:
        """The result, and what does it again in a graph."""
        tensors = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        if ours or self._cards.has(kwargs.get("device")):
            special = self._with_cards(func, args, kwargs, tensors)
            if special is NOTHING_SPECIAL:
                return self._on_card(func, args, kwargs, tensors, ours)
        else:
            special = self._on_host(func, args, kwargs)
        return special, functools.partial(func, *args, **kwargs)

    def _with_cards(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> Any:  # fmt: skip
        """What is no operation of one card: copies between devices, and questions; else NOTHING_SPECIAL."""
        target = kwargs.get("device")
        if func is aten.is_pinned.default:
            return not isinstance(args[0], DeviceTensor) and self._cards.pinned(args[0])
        if func is aten._fused_sdp_choice.default:
            if torch.backends.cuda.cudnn_sdp_enabled():
                self._cards.plan_attention(tuple(tensor.shape for tensor in tensors))
            return ATTENTION_BY_PLAIN_OPERATIONS
        if func is aten._to_copy.default and target is not None:
            source = args[0]
            if torch.device(target) != source.device:
                return self._copy_to_new(source, torch.device(target), kwargs)
        if func is aten.copy_.default and args[0].device != args[1].device:
            self._copy(args[0], args[1], bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False))
            return args[0]
        return NOTHING_SPECIAL

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.is_pinned.default:
            return self._cards.pinned(args[0])
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"pin_memory": False})
        self._cards.pin(made)
        return made

    def _on_card(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor],
        ours: list[DeviceTensor],
    ) -> tuple[Any, Callable[[], Any]]:  # fmt: skip
        if func in INDEXING:
            tensors = [leaf for leaf in _leaves(args[:1] + args[2:], {}) if isinstance(leaf, torch.Tensor)]
        device = self._common_device(func, kwargs, tensors, ours)
        stream = self._cards.stream(device.index)
        plain = {name: _mapped(_inner, value) for name, value in kwargs.items() if name != "pin_memory"}
        if "device" in plain:
            plain["device"] = torch.device("cpu")
        compute = functools.partial(func, *_mapped(_inner, args), **plain)
        out = compute()
        if func in UNWRITTEN:
            poison(out)
        by_inner = {id(tensor.inner): tensor for tensor in ours}
        memories = {tensor.inner.untyped_storage().data_ptr(): tensor.memory for tensor in ours}
        made = [leaf for leaf in _leaves((out,), {}) if isinstance(leaf, torch.Tensor)]
        written = _written(func, args, kwargs)
        shares = not written and made and all(leaf.untyped_storage().data_ptr() in memories for leaf in made)
        fresh: list[DeviceTensor] = []

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if written and id(leaf) in by_inner:
                same = by_inner[id(leaf)]
                assert same.shape == leaf.shape, f"{func} changes a shape in place: not modelled"
                return same
            memory = memories.get(leaf.untyped_storage().data_ptr()) if leaf.numel() else None
            if memory is None:
                memory = Memory(self._cards, stream, leaf.untyped_storage().nbytes())
            tensor = DeviceTensor(leaf, device, memory)
            fresh.append(tensor)
            return tensor

        result = _mapped(wrap, out)
        touched = None if shares or func in UNWRITTEN else [*written, *fresh]
        self._judge(func, args, device, ours, touched)

        def again() -> Any:
            """Computes into the memory of the results."""
            values = [leaf for leaf in _leaves((compute(),), {}) if isinstance(leaf, torch.Tensor)]
            for old, new in zip(made, values, strict=True):
                if func in UNWRITTEN:
                    poison(old)
                elif old.data_ptr() != new.data_ptr():
                    old.copy_(new)
            self._judge(func, args, device, ours, touched)
            return result

        return result, again

    def _judge(
        self, func: Any, args: tuple[Any, ...], device: torch.device, ours: list[DeviceTensor],
        touched: list[DeviceTensor] | None,
    ) -> None:  # fmt: skip
        """An operation as the card sees it: reads `ours`, writes `touched` (None: no kernel is launched for it)."""
        stream = self._cards.stream(device.index)
        if func in INDEXING:
            self._check_indices(args[1], stream)
        if func in PRODUCTS:
            self._cards.multiply(stream)
        if touched is not None:
            self._cards.launch(stream, str(func), ours, touched)
        if func in READ_BY_HOST or func in SIZED_BY_DATA:
            self._cards.wait(stream, str(func))

    def _common_device(
        self, func: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], ours: list[DeviceTensor]
    ) -> torch.device:
        """The one device of an operation. Raises RuntimeError, as torch does, where there are several."""
        found = {tensor.device for tensor in ours}
        if self._cards.has(kwargs.get("device")):
            found.add(self._cards.device(kwargs["device"]))
        hosts = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
        if len(found) > 1 or any(host.dim() for host in hosts):
            names = ", ".join(sorted({str(device) for device in found} | {str(host.device) for host in hosts}))
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {names}")
        return found.pop()

    def _check_indices(self, indices: Any, stream: FakeStream) -> None:
        for index in indices:
            if index is None:
                continue
            if not isinstance(index, DeviceTensor):
                self._cards.wait(stream, "indexing by a host tensor")
            if index.dtype in (torch.bool, torch.uint8):
                self._cards.wait(stream, "indexing by a mask")

    def _copy_to_new(self, source: torch.Tensor, target: torch.device, kwargs: dict[str, Any]) -> torch.Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        inner = source.inner if isinstance(source, DeviceTensor) else source
        values = torch.empty_like(inner, dtype=dtype, device="cpu")
        if target.type == "cpu":
            if kwargs.get("pin_memory"):
                self._cards.pin(values)
            made: torch.Tensor = values
        else:
            target = self._cards.device(target)
            stream = self._cards.stream(target.index)
            made = DeviceTensor(values, target, Memory(self._cards, stream, values.untyped_storage().nbytes()))
        self._copy(made, source, bool(kwargs.get("non_blocking")))
        return made

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        """Between two devices, on the current stream of the card (of two cards: the source's, ordered with both)."""
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            mine, theirs = (self._cards.stream(tensor.device.index) for tensor in (target, source))
            theirs.wait_stream(mine)
            target.inner.copy_(source.inner)
            self._cards.launch(theirs, "copy between cards", [source], [target])
            mine.wait_stream(theirs)
        elif isinstance(target, DeviceTensor):
            stream = self._cards.stream(target.device.index)
            target.inner.copy_(source)
            tick = self._cards.transfer(stream, "copy to the card", target.inner.nbytes, [], [target])
            if non_blocking and self._cards.pinned(source):
                self._cards.keep_until(stream, tick, source)
            elif not non_blocking:
                self._cards.wait(stream, "blocking copy to the card")
        else:
            assert isinstance(source, DeviceTensor)
            stream = self._cards.stream(source.device.index)
            self._cards.bytes_to_host += source.inner.nbytes
            tick = self._cards.transfer(stream, "copy to the host", source.inner.nbytes, [source], [])
            if non_blocking and self._cards.pinned(target):
                self._cards.deliver(stream, tick, target, source.inner.to(target.dtype).clone())
            else:
                target.copy_(source.inner)
                self._cards.wait(stream, "blocking copy to the host")


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[DeviceTensor]:
    """Arguments that the operation changes."""
    found = []
    for at, name in _changed_arguments(func):
        value = args[at] if at < len(args) else kwargs.get(name)
        found += [leaf for leaf in _leaves((value,), {}) if isinstance(leaf, DeviceTensor)]
    return found


@functools.cache
def is_view(func: Any) -> bool:
    """Whether an operation's results are memory of its arguments, which it leaves as they are."""
    returns = [result.alias_info for result in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


@functools.cache
def _changed_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that the operation's schema says it writes."""
    return tuple(
        (at, argument.name)
        for at, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _leaves(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments of an operation, lists of tensors taken apart."""
    found: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, list | tuple):
            found += _leaves(value, {})
        else:
            found.append(value)
    return found


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """An argument or result with `change` done to what is in its lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, item) for item in value])
    return change(value)
