"""What a step computes, as plain descriptions: whoever reads a model writes these, `emit` makes operations of them."""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.format.spec import Activation, ExpertSpec
from cpu_kernels.step.attend import EVERYTHING, Sight
from cpu_kernels.step.heads import NO_CLIP, HeadNorm, Tuning
from cpu_kernels.step.latent import LatentSizes
from cpu_kernels.step.products import Product
from cpu_kernels.step.router import Selection
from cpu_kernels.step.states.gated_norm import GatedNorm
from cpu_kernels.step.states.recurrence import Fading, Heads
from cpu_kernels.step.stream import Embedding, Norm


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
class GateColumns:
    """Columns that let an attention's result through: `n` for each head, its v_dim or one. kind: how, one of
    `cpu_kernels.step.attend`'s."""

    columns: Columns
    n: int
    kind: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention over a KV cache. `inputs` read the normalised stream; q, k and v are columns of their results.

    gate: what the result is multiplied with, before the output projection. v_scale: what values are multiplied with
    before the cache holds them. cache: number of the cache layer.
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
    sight: Sight = EVERYTHING
    sinks: np.ndarray | None = None
    clip: float = NO_CLIP
    tuning: Tuning | None = None
    gate: GateColumns | None = None
    v_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Index:
    """What chooses the tokens that attention reads: queries from the short vector (`query`), keys and each head's
    weight from the stream. norm: over the keys. rope: of queries and keys alike."""

    query: Product
    key: Product
    weights: Product
    norm: Norm
    rope: Rope | None


@dataclass(frozen=True, slots=True)
class HeadGate:
    """A product of the stream that lets each head's result through, one column a head. kind: as of `GateColumns`."""

    product: Product
    kind: int


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Latent attention: the cache holds one vector of each token and a rotated part, which all heads share.

    query: the heads' queries from the stream, or a short vector, from which `query_up` makes them behind `query_norm`.
    down: the vector and the rotated part of a token; norm: over the vector. up: from it the keys and values of each
    head; rows that are not packed, in `up_rows` where they lie nowhere else. rope: its first column counts from the
    rotated part's beginning. top_k: to how many tokens a row attends at most, which `index` chooses, or (None) those
    that the last attention before with as many has chosen; 0: to all. rotated_norm: a plain RMS norm over the
    rotated part, before it is rotated.
    """

    query: Product
    down: Product
    norm: Norm
    up: Product
    output: Product
    sizes: LatentSizes
    rope: Rope | None
    scale: float
    cache: int
    query_norm: Norm | None = None
    query_up: Product | None = None
    up_rows: np.ndarray | None = None
    tuning: Tuning | None = None
    top_k: int = 0
    index: Index | None = None
    gate: HeadGate | None = None
    rotated_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class HeadColumns:
    """Columns of heads in the results of one projection: its number, and the first column of each head."""

    product: int
    firsts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Channels of heads that follow each other, `dim` of each. before, after: columns that they are multiplied with
    before the convolution and after it. eps: of the L2 norm of each head (0: none), then times `scale`."""

    columns: HeadColumns
    dim: int
    eps: float = 0.0
    scale: float = 1.0
    before: HeadColumns | None = None
    after: HeadColumns | None = None


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What a layer's matrices do with its channels: `recurrence` has the rules. beta, fades: of each head, or (fading
    for each column of a key) where its columns begin. skip float32 [heads]."""

    rule: int
    heads: Heads
    fading: Fading
    beta: HeadColumns | None = None
    fades: HeadColumns | None = None
    skip: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class StateLayer:
    """A layer that keeps states: linear attention, Mamba 2, or a convolution alone (no recurrence: the channels are
    the result).

    inputs: read the normalised stream; behind: (number of the projection that it reads, the projection), which have the
    numbers after those. weight float32 [channels, taps], bias float32 [channels]: of the convolution over time, None
    where there is none. gate: columns of each group of the norm. cache: number of the cache layer.
    """

    inputs: tuple[Product, ...]
    segments: tuple[Segment, ...]
    output: Product
    cache: int
    behind: tuple[tuple[int, Product], ...] = ()
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    has_silu: bool = False
    recurrence: Recurrence | None = None
    norm: GatedNorm | None = None
    gate: HeadColumns | None = None

    @property
    def projections(self) -> list[Product]:
        """All but the last, by their numbers."""
        return [*self.inputs, *(product for _, product in self.behind)]


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(act(gate x) * up x), or down(act(up x)) without a gate. fused: `up` gives gate's columns, then up's.

    switch: a product with one output, whose sigmoid the result is multiplied with. scale: of the result.
    """

    up: Product
    down: Product
    activation: Activation
    gate: Product | None = None
    fused: bool = False
    switch: Product | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts and shared ones. addresses int64 [experts]: of the packed records; experts of the router beyond
    these are the identity.

    scaled_inputs: an expert's input is multiplied with its weight, and its output is not. router_norm: of the block's
    input, which the router reads. What routed experts read goes through `enter` and `expert_norm`, and their sum
    through `leave`, where there are such.
    """

    router: Product
    selection: Selection
    spec: ExpertSpec
    addresses: np.ndarray
    shared: tuple[Mlp, ...] = ()
    scaled_inputs: bool = False
    router_norm: Norm | None = None
    expert_norm: Norm | None = None
    enter: Product | None = None
    leave: Product | None = None


@dataclass(frozen=True, slots=True)
class Arm:
    """One of several cores whose results are summed: post(core(pre(x))), where x is given to all of them.

    late: its result is not in this sum, but in that of the next branch that takes it.
    """

    core: "Core"
    pre: Norm | None = None
    post: Norm | None = None
    late: bool = False


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of what cores compute side by side from the same rows."""

    arms: tuple[Arm, ...]


Core = Attention | LatentAttention | StateLayer | Mlp | Moe | Sum


@dataclass(frozen=True, slots=True)
class Branch:
    """stream = keep * stream + scale * post(core(pre(stream))).

    renews: from here on pre(stream) is the stream, which is kept and added to. takes: the results of late arms before
    are added as well.
    """

    core: Core
    pre: Norm | None
    post: Norm | None = None
    scale: float = 1.0
    keep: float = 1.0
    renews: bool = False
    takes: bool = False

    @property
    def cores(self) -> tuple[Core, ...]:
        """What is computed: the core, or the cores that are summed."""
        return _single(self.core)


def _single(core: Core) -> tuple[Core, ...]:
    return tuple(one for arm in core.arms for one in _single(arm.core)) if isinstance(core, Sum) else (core,)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """After the last layer: norm, output layer, and what the logits are multiplied with. cap: logits x are then
    cap * tanh(x / cap); 0: they stay."""

    norm: Norm
    output: Product
    scale: float = 1.0
    cap: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """A whole step. ropes: angles (half the rotated columns) of each table."""

    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    ropes: tuple[int, ...]
