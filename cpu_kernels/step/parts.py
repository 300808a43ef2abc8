"""What a step computes, as plain descriptions: whoever reads a model writes these, `emit` makes operations of them."""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.format.spec import Activation, ExpertSpec
from cpu_kernels.step.embed import Embedding
from cpu_kernels.step.heads import NO_CLIP, HeadNorm
from cpu_kernels.step.products import Product
from cpu_kernels.step.router import Selection
from cpu_kernels.step.stream import Norm


@dataclass(frozen=True, slots=True)
class Rope:
    """`n` columns of each head, from `first`, are rotated; `table` says by which of the step's angles, `kind` how."""

    table: int
    n: int
    first: int
    kind: int


@dataclass(frozen=True, slots=True)
class Columns:
    """Where heads lie: number of the input projection, first column, columns from one head to the next."""

    product: int
    first: int
    head: int


@dataclass(frozen=True, slots=True)
class Latent:
    """Keys and values from a short vector of each token: `down` gives it and the rotated part of all key heads, `norm`
    is over its first columns, `up` gives each head's keys (those that are not rotated) and values."""

    down: Product
    norm: Norm
    up: Product
    rotated: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention over a KV cache. `inputs` read the normalised stream; q, k and v are columns of their results.

    query_norm, query_up: a second projection after the first of `inputs`, with a norm between. latent: k and v then
    are columns of `latent.up`. window: tokens looked back at, 0 = all. cache: number of the cache layer.
    """

    inputs: tuple[Product, ...]
    output: Product
    q: Columns
    k: Columns
    v: Columns
    n_heads: int
    n_kv_heads: int
    dim: int
    v_dim: int
    scale: float
    cache: int
    norm: HeadNorm | None = None
    rope: Rope | None = None
    window: int = 0
    sinks: np.ndarray | None = None
    clip: float = NO_CLIP
    row_scales: bool = False
    query_norm: Norm | None = None
    query_up: Product | None = None
    latent: Latent | None = None


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(act(gate x) * up x), or down(act(up x)) without a gate. fused: `up` gives gate's columns, then up's.

    switch: a product with one output, whose sigmoid the result is multiplied with.
    """

    up: Product
    down: Product
    activation: Activation
    gate: Product | None = None
    fused: bool = False
    switch: Product | None = None


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts and shared ones. addresses int64 [experts]: of the packed records.

    scaled_inputs: an expert's input is multiplied with its weight, and its output is not.
    """

    router: Product
    selection: Selection
    spec: ExpertSpec
    addresses: np.ndarray
    shared: tuple[Mlp, ...] = ()
    scaled_inputs: bool = False


@dataclass(frozen=True, slots=True)
class Branch:
    """stream += scale * post(core(pre(stream)))."""

    core: Attention | Mlp | Moe
    pre: Norm | None
    post: Norm | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """After the last layer: norm, output layer, and what the logits are multiplied with."""

    norm: Norm
    output: Product
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Model:
    """A whole step. ropes: angles (half the rotated columns) of each table."""

    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    ropes: tuple[int, ...]
