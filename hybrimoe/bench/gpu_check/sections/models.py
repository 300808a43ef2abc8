"""The random model that sections run, opened one at a time, and its logits step by step."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu_kernels.driver.functions import SWITCH
from hybrimoe.bench.gpu_check.setting import EMULATED, Setting
from hybrimoe.bench.model.sources import RandomSource
from hybrimoe.config.deploy import DeployConfig, load_config
from hybrimoe.generation import PrefixCache, TextGenerator

SEED = 1


def source(setting: Setting, layers: int | None = None) -> RandomSource:
    """Random weights in the setting's shape."""
    context = setting.long_prompt_tokens + max(setting.speed_tokens, setting.new_tokens) + 1
    return RandomSource(setting.shape, layers or setting.layers, context, replaced=setting.smaller)


WITHOUT_CARD = ("none", EMULATED)


def deployment(
    accelerator: str, dtype: str, policy: str, share: float, *, dense_dtype: str = "auto", step: str = "auto"
) -> DeployConfig:
    """Experts of `dtype`, `share` of them with a slot. On a card decode steps are captured unless `step` is
    "transformers"; elsewhere they are transformers' own: the plain way is what a card is compared with."""
    return load_config(
        {}, accelerator=accelerator, gpu_expert_slots=share or 0, expert_dtype=dtype, policy=policy,
        dense_dtype=dense_dtype, step="transformers" if accelerator in WITHOUT_CARD else step,
    )  # fmt: skip


@contextmanager
def opened(
    setting: Setting, accelerator: str, dtype: str, *, policy: str = "ours", share: float = 0.0,
    dense_dtype: str = "float32", step: str = "auto",
) -> Iterator[TextGenerator]:  # fmt: skip
    """A model with hybrid experts. Its dense weights are float32 unless said otherwise: what differs then between two
    devices is the experts'."""
    made = source(setting)
    wanted = deployment(accelerator, dtype, policy, share, dense_dtype=dense_dtype, step=step)
    model = made.hybrid(wanted, lambda *_: None)
    try:
        yield TextGenerator(model, made.tokenizer)
    finally:
        model.hybrimoe.session.close()
        del model
        gc.collect()


@contextmanager
def python_between_pieces(wanted: bool = True) -> Iterator[None]:
    """Models that are loaded within the block have Python run between the pieces of captured steps."""
    before = os.environ.get(SWITCH)
    if wanted:
        os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop(SWITCH, None)
            os.environ.update({} if before is None else {SWITCH: before})


def n_looped(generator: TextGenerator) -> int:
    """Decode steps that one compiled call has run, from the first piece to the last."""
    return int(getattr(generator.model.hybrimoe.step, "n_looped", 0))


def step_way(generator: TextGenerator) -> str:
    """How the decode steps of an opened model run."""
    return "; ".join(generator.model.hybrimoe.way.described().values())


def prompt(setting: Setting, n_tokens: int | None = None) -> list[int]:
    """Random tokens, the same in every section."""
    vocab_size = source(setting).vocab_size
    return [int(t) for t in np.random.default_rng(SEED).integers(3, vocab_size, n_tokens or setting.prompt_tokens)]


def greedy(generator: TextGenerator, ids: Sequence[int], n_tokens: int) -> list[int]:
    """The most likely token after the prompt, `n_tokens` times."""
    cache = PrefixCache(generator.model)
    logits = generator.forward(ids, cache)
    tokens = [int(logits.argmax())]
    while len(tokens) < n_tokens:
        tokens.append(int(generator.forward(tokens[-1:], cache).argmax()))
    return tokens


def forced_logits(generator: TextGenerator, ids: Sequence[int], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits [1 + n, V] after a prompt, and after each of `tokens` that are then given to the model one by one."""
    cache = PrefixCache(generator.model)
    rows: list[Any] = [generator.forward(ids, cache)]
    rows += [generator.forward([token], cache) for token in tokens]
    return np.stack([row.float().cpu().numpy() for row in rows])


def cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Of two rows of logits; NaN where one has a value that is not finite."""
    first, second = one.astype(np.float64), other.astype(np.float64)
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second) + 1e-30))
