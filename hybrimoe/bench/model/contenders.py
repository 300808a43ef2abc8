"""What is measured side by side: hybrid models under several policies and dtypes, plain transformers, llama.cpp."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from hybrimoe.bench.model.weights import gguf_step_bytes, step_bytes
from hybrimoe.errors import MissingExtraError, ModelError
from hybrimoe.runtime.layer_call.stats import ran_emulated

if TYPE_CHECKING:
    from hybrimoe.generation import PrefixCache, SamplingOptions, TextGenerator

Progress = Callable[[int, int, str], None]

CONTEXT = 8192
"""Tokens of llama.cpp's context at least."""

LOGITS_COSINE = {"float32": 0.9999, "bfloat16": 0.998, "int8": 0.99, "int6": 0.97, "int5": 0.95, "int4": 0.9}
LOGITS_COSINE |= {"int3": 0.6, "int2": 0.1}
"""Least cosine of the logits to plain transformers' for a contender's numbers to count, by expert dtype. A broken
kernel or a wrong expert falls far below; int4 (group 32, symmetric) measures 0.95 and above on real models."""

LLAMA_KV = {"f16": None, "q8_0": 8, "q4_0": 2}
"""How llama.cpp may store keys and values -> its number for it (None: its default, without flash attention; values in
fewer bits need flash attention)."""

SEED = 1
"""Of prompts, and of the tokens drawn: all contenders of one dtype compute the same tokens."""


@dataclass(slots=True)
class Contender:
    """One column of a comparison. `dtype` None or `lossy`: not judged by `LOGITS_COSINE`."""

    label: str
    generator: TextGenerator
    session: Any = None
    dtype: str | None = None
    lossy: bool = False
    counters: list[dict[str, Any]] = field(default_factory=list)
    open_s: float = 0.0
    resident_mib: float = 0.0
    _kept: PrefixCache | None = None
    """The prompt's keys and values, from round to round of `decode`."""

    @property
    def step_bytes(self) -> int | None:
        """Weights that a decode step of one token reads."""
        return step_bytes(self.generator.model)

    def prefill(self, prompt_ids: Sequence[int]) -> float:
        """Tokens per second of computing a prompt from nothing."""
        from hybrimoe.generation import PrefixCache

        cache = PrefixCache(self.generator.model)
        cache.clear()
        self._reset()
        started = time.perf_counter()
        self.generator.forward(prompt_ids, cache).argmax().item()  # waits for a device that computes on its own
        taken = time.perf_counter() - started
        self._keep("prefill")
        return len(prompt_ids) / taken

    def decode(self, prompt_ids: Sequence[int], n_tokens: int) -> float:
        """Tokens per second of `n_tokens` decode steps after a prompt, which is computed in the first round."""
        from hybrimoe.generation import PrefixCache

        self._kept = self._kept or PrefixCache(self.generator.model)
        self._reset()
        reply = self.generator.reply(prompt_ids, _drawn(n_tokens), cache=self._kept)
        "".join(reply)
        self._keep("decode")
        return len(reply.times.between_tokens_us) / reply.times.decode_us * 1e6

    def profile(self, prompt_ids: Sequence[int], n_tokens: int) -> dict[str, Any]:
        """Where the time of a prompt and `n_tokens` decode steps goes, as `Profile.as_dict`."""
        from hybrimoe.generation import Profile

        profile = Profile(self.generator.model)
        "".join(self.generator.reply(prompt_ids, _drawn(n_tokens), profile=profile))
        return profile.as_dict()

    def logits(self, prompt_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after a prompt, float32 [V]."""
        from hybrimoe.generation import PrefixCache

        cache = PrefixCache(self.generator.model)
        cache.clear()
        values: NDArray[np.float32] = self.generator.forward(prompt_ids, cache).float().cpu().numpy()
        return values

    def _reset(self) -> None:
        if self.session is not None:
            self.session.reset_stats()

    def _keep(self, phase: str) -> None:
        if self.session is not None:
            stats = self.session.stats().as_dict()
            self.counters.append({**stats[phase], "emulated": ran_emulated(stats), "slots": stats["n_slots"]})


def _drawn(n_tokens: int) -> SamplingOptions:
    """Options of `n_tokens` decode steps: drawn from the model's own probabilities, wherever the text ends."""
    from hybrimoe.generation import SamplingOptions

    return SamplingOptions(temperature=1.0, top_k=0, seed=SEED, max_new_tokens=n_tokens + 1, ignore_eos=True)


@contextmanager
def hybrid(label: str, make: Callable[[], Any], tokenizer: Any, lossy: bool = False) -> Iterator[Contender]:
    """A model with hybrid experts, made by `make` (hybrimoe.load, or random weights)."""
    from hybrimoe.generation import TextGenerator

    model = make()
    try:
        session = model.hybrimoe.session
        yield Contender(label, TextGenerator(model, tokenizer), session, session.config.expert_dtype, lossy)
    finally:
        model.hybrimoe.session.close()
        del model
        gc.collect()


def plain(label: str, model: Any, tokenizer: Any) -> Contender:
    """Transformers as it is."""
    from hybrimoe.generation import TextGenerator

    return Contender(label, TextGenerator(model, tokenizer))


class LlamaCpp:
    """A GGUF file through llama-cpp-python; the interface of `Contender` as far as speed goes."""

    def __init__(
        self, path: str, threads: int, n_tokens: int, device_layers: int = 0, *, mapped: bool = False, kv: str = "f16",
        flash: bool = False,
    ) -> None:  # fmt: skip
        """threads: of prompts and of decode steps. n_tokens: of prompt and reply together, which its context holds.
        device_layers: on the device, where llama.cpp is built for one; -1: all. mapped: weights stay pages of the file,
        without copies in layouts that are faster to compute with, and the context is no longer than it must be: for a
        model that does not fit memory. kv: one of LLAMA_KV. flash: flash attention, which q8_0 and q4_0 take anyway."""
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise MissingExtraError("bench", "llama.cpp beside it needs llama-cpp-python as well") from error
        flash = flash or LLAMA_KV[kv] is not None
        self.label = (
            "llama.cpp" + f", {kv} keys and values" * (kv != "f16") + ", flash attention" * (flash and kv == "f16")
        )
        self.dtype: str | None = None
        self.counters: list[dict[str, Any]] = []
        self.open_s = self.resident_mib = 0.0
        self.step_bytes = gguf_step_bytes(path)
        context = n_tokens + 1 if mapped else max(CONTEXT, n_tokens + 1)
        with _without_copies() if mapped else nullcontext():
            self.llama = Llama(
                model_path=path, n_threads=threads, n_threads_batch=threads, n_ctx=context, n_gpu_layers=device_layers,
                type_k=LLAMA_KV[kv], type_v=LLAMA_KV[kv], flash_attn=flash, verbose=False,
            )  # fmt: skip
        self._held: list[int] = []
        kinds = ("_is_recurrent", "_is_hybrid")
        self._keeps_states = any(getattr(self.llama, kind, False) for kind in kinds)

    def prefill(self, prompt_ids: Sequence[int]) -> float:
        """Tokens per second of computing a prompt from nothing."""
        self._held = []
        self.llama.reset()
        started = time.perf_counter()
        self.llama.eval(self._known(prompt_ids))
        return len(prompt_ids) / (time.perf_counter() - started)

    def decode(self, prompt_ids: Sequence[int], n_tokens: int) -> float:
        """Tokens per second of `n_tokens` decode steps after a prompt, which is computed in the first round, and again
        in each where the model keeps states, of which no earlier ones are left."""
        prompt = self._known(prompt_ids)
        if self._held != prompt or self._keeps_states:
            self.llama.reset()
            self.llama.eval(prompt[:-1])
            self._held = prompt
        self.llama.n_tokens = len(prompt) - 1  # `eval` takes out of its memory what comes after
        self.llama.eval(prompt[-1:])
        token = self.greedy()
        started = time.perf_counter()
        for _ in range(n_tokens):
            self.llama.eval([token])
            token = self.greedy()
        return n_tokens / (time.perf_counter() - started)

    def logits(self, prompt_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after a prompt, float32 [V]."""
        self._held = []
        self.llama.reset()
        self.llama.eval(self._known(prompt_ids))
        return self._last_logits().copy()

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Computes tokens behind those before; logits [V] after the last of them."""
        self.llama.eval(self._known(tokens))
        return self._last_logits().copy()

    def _last_logits(self) -> NDArray[np.float32]:
        from llama_cpp import llama_get_logits_ith

        address = llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(address, shape=(self.llama.n_vocab(),))

    def greedy(self) -> int:
        """The most probable token after what was computed."""
        return int(self._last_logits().argmax())

    def _known(self, prompt_ids: Sequence[int]) -> list[int]:
        return [token % self.llama.n_vocab() for token in prompt_ids]


@contextmanager
def _without_copies() -> Iterator[None]:
    """A model that is opened meanwhile computes from the file's own layout. llama.cpp has a setting for it, for which
    `Llama` has no argument."""
    from llama_cpp import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def without() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = without
    try:
        yield
    finally:
        llama_cpp.llama_model_default_params = defaults


def check_parity(contenders: Sequence[Any], prompt_ids: Sequence[int]) -> dict[str, float]:
    """Cosine of each hybrid contender's logits to the reference; the first plain model, else the first of its dtype.

    Raises:
        ModelError: one is below `LOGITS_COSINE`: what computes wrong numbers has no speed worth telling.
    """
    judged = [contender for contender in contenders if isinstance(contender, Contender) and not contender.lossy]
    reference = {contender.dtype: contender for contender in reversed(judged)}
    cosines: dict[str, float] = {}
    for contender in judged:
        against = reference.get(None) or reference[contender.dtype]
        if contender is against or contender.dtype is None:
            continue
        cosine = _cosine(contender.logits(prompt_ids), against.logits(prompt_ids))
        cosines[contender.label] = cosine
        if not cosine >= LOGITS_COSINE[contender.dtype]:
            raise ModelError(
                f"{contender.label}: logits have a cosine of {cosine:.4f} to {against.label}, expected at least "
                f"{LOGITS_COSINE[contender.dtype]} for {contender.dtype}; no speed is reported for wrong numbers"
            )
    if None in reference:
        peers = [contender for contender in contenders if isinstance(contender, LlamaCpp)]
        for peer in peers:  # told beside ours; its numbers are its own affair
            cosines[peer.label] = _cosine(peer.logits(prompt_ids), reference[None].logits(prompt_ids))
    return cosines


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    first, second = one.astype(np.float64), other.astype(np.float64)
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second) + 1e-30))


@contextmanager
def all_open(openers: Sequence[Callable[[ExitStack], Any]]) -> Iterator[list[Any]]:
    """Every contender at once, because rounds alternate between them."""
    with ExitStack() as stack:
        yield [_opened(opener, stack) for opener in openers]


def _opened(opener: Callable[[ExitStack], Any], stack: ExitStack) -> Any:
    """A contender with the time that it took to open, and by how much the process's resident memory grew."""
    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    contender = opener(stack)
    contender.open_s = time.perf_counter() - started
    contender.resident_mib = (process.memory_info().rss - before) / 2**20
    return contender
