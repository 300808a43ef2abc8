"""From the description of layers to the operations of a program."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from cpu_kernels.host.isa import BY_NAME
from cpu_kernels.simd.formats import Format, format_of
from cpu_kernels.step import attend, heads, index, latent
from cpu_kernels.step.cached import PLACE_SIZE
from cpu_kernels.step.capped import add_cap
from cpu_kernels.step.emit_experts import ExpertsEmitter, first_half
from cpu_kernels.step.parts import (
    Attention,
    Branch,
    Columns,
    Core,
    Head,
    HeadColumns,
    HeadGate,
    Index,
    LatentAttention,
    Layer,
    Mlp,
    Moe,
    Rope,
    Segment,
    StateLayer,
    Sum,
)
from cpu_kernels.step.products import Product, Shared, add_product
from cpu_kernels.step.program import FIRST_ROW, MAX_ROWS, N_ROWS, Part
from cpu_kernels.step.states import recurrence
from cpu_kernels.step.states.channels import Unit, add_channels
from cpu_kernels.step.states.gated_norm import add_gated_norm
from cpu_kernels.step.states.held import STATES_SIZE
from cpu_kernels.step.stream import Norm, Summand, Target, add_stream


@dataclass(slots=True)
class CacheCalls:
    """The call vectors of one attention and of its index, and the table that says where the step's sequences lie in
    caches."""

    layer: int
    attend: np.ndarray
    places: np.ndarray  # int64 [MAX_ROWS, cached.PLACE_SIZE]
    index: np.ndarray | None = None


@dataclass(slots=True)
class StateCalls:
    """The table that says where the step's sequences keep the states of one layer."""

    layer: int
    places: np.ndarray  # int64 [MAX_ROWS, held.STATES_SIZE]


@dataclass(slots=True)
class Emitter(ExpertsEmitter):
    """Adds layers to a program. pending: results that the next row operation adds to the stream; keep: what the stream
    is multiplied with before. caches, states: of its attention and of its layers with states, in order."""

    caches: list[CacheCalls] = field(default_factory=list)
    states: list[StateCalls] = field(default_factory=list)
    pending: list[Summand] = field(default_factory=list)
    keep: float = 1.0
    angles: list[tuple[int, int]] = field(init=False)
    _of_head: Shared = field(init=False)

    def __post_init__(self) -> None:
        self._begin()
        self._of_head = Shared.of(self.program, self.program.head_state)
        self.angles = [
            (self.program.floats(f"cos {i}", n), self.program.floats(f"sin {i}", n)) for i, n in enumerate(self.ropes)
        ]

    def set_rows(self, n_rows: int, n_logits: int) -> None:
        """The next run has so many rows, of which the last n_logits have logits."""
        for shared, first in ((self._shared, 0), (self._of_head, n_rows - n_logits)):
            shared.state[[FIRST_ROW, N_ROWS]] = first, n_rows - first
            shared.starts[1] = n_rows - first

    def layer(self, number: int, layer: Layer) -> None:
        """All branches of a layer; `number` is what errors and counters call it."""
        self._layer = number
        for branch in layer.branches:
            self._branch(branch)

    def close(self) -> None:
        """Adds what is pending to the stream: the end of a program that is not a whole model."""
        add_stream(
            self.program, Part.NORMS, self._layer, self.stream, self.width, keep=self.keep, summands=self.pending
        )
        self.pending, self.keep = [], 1.0

    def head(self, head: Head) -> int:
        """Final norm and output layer; returns where the logits float32 [rows that have some, n_out] go."""
        out, form = self.program.floats("normed", self.width), head.output.format(self.isa_name)
        source = self._target("input", form, out, self.width)
        add_stream(
            self.program, Part.NORMS, self._layer, self.stream, self.width, keep=self.keep, summands=self.pending,
            norm=head.norm, out=out, targets=() if source.address == out else (source,), state=self._of_head.state,
        )  # fmt: skip
        self.pending, self.keep = [], 1.0
        logits = self.program.logits(head.output.n_out)
        add_product(
            self.program, self._of_head, Part.OUTPUT_LAYER, head.output, source, logits, self.isa_name, scale=head.scale
        )
        if head.cap:
            add_cap(self.program, self._of_head.state, logits, head.output.n_out, head.cap)
        return logits

    def _branch(self, branch: Branch) -> None:
        core = branch.core
        rows, sources = self._normalised(branch.pre, self._formats(core), renews=branch.renews)
        self._n_names = 0
        results = self._core(core, rows, sources)
        if branch.post is not None:
            results = [self._normed_sum(results, branch.post)]
        self.pending = [Summand(r.address, r.parts, r.scale * branch.scale, r.gate) for r in results]
        if branch.takes:
            self.pending += self._late
            self._late = []
        self.keep = branch.keep

    def _core(self, core: Core, rows: int, sources: list[Target]) -> list[Summand]:
        """What a core computes from float rows, which lie in `sources` as it reads them."""
        if isinstance(core, Sum):
            return self._sum(core, rows, sources)
        if isinstance(core, Attention):
            return [self._attention(core, sources)]
        if isinstance(core, LatentAttention):
            return [self._latent_attention(core, sources)]
        if isinstance(core, StateLayer):
            return [self._state_layer(core, sources)]
        if isinstance(core, Moe):
            return self._moe(core, sources, rows)
        return [self._mlp(core, sources, Part.PROJECTIONS)]

    def _sum(self, core: Sum, rows: int, sources: list[Target]) -> list[Summand]:
        """The results of cores that read the same rows, or norms of their own of these."""
        read, results = iter(sources), []
        for number, arm in enumerate(core.arms, self._numbers(len(core.arms))):
            forms, own = self._formats(arm.core), rows
            if arm.pre is None:
                targets = [next(read) for _ in forms]
            else:
                own = self.program.floats(f"normed {number}", self.width)
                targets = self._written(rows, arm.pre, own, forms, f"input {number} of")
            found = self._core(arm.core, own, targets)
            if arm.post is not None:
                found = [self._normed_sum(found, arm.post, f" {number}")]
            if arm.late:
                self._late.append(self._kept_sum(found))
            else:
                results += found
        return results

    def _formats(self, core: Core) -> list[Format]:
        """Formats of what reads the normalised stream, in the order in which it is read."""
        if isinstance(core, Sum):
            return [form for arm in core.arms if arm.pre is None for form in self._formats(arm.core)]
        if isinstance(core, Attention | StateLayer):
            return [product.format(self.isa_name) for product in core.inputs]
        if isinstance(core, LatentAttention):
            of_index = () if core.index is None else (core.index.key, core.index.weights)
            of_gate = () if core.gate is None else (core.gate.product,)
            return [product.format(self.isa_name) for product in (core.query, core.down, *of_index, *of_gate)]
        if isinstance(core, Mlp):
            return [product.format(self.isa_name) for product in first_half(core)]
        shared = [product.format(self.isa_name) for mlp in core.shared for product in first_half(mlp)]
        router = [core.router.format(self.isa_name)] if core.router_norm is None else []
        if core.enter is not None:
            return [*shared, *router, core.enter.format(self.isa_name)]
        own = core.scaled_inputs or core.expert_norm is not None
        return [*shared, *router, *([] if own else [format_of(core.spec.dtype, BY_NAME[self.isa_name])])]

    def _normalised(self, norm: Norm | None, forms: list[Format], *, renews: bool = False) -> tuple[int, list[Target]]:
        """Adds the row operation of a branch; returns where its float rows lie and where each reader finds them."""
        out = self.stream if norm is None or renews else self.program.floats("normed", self.width)
        targets = self._written(self.stream, norm, out, forms, "input", self.keep, self.pending)
        self.pending, self.keep = [], 1.0
        return out, targets

    def _attention(self, core: Attention, sources: list[Target]) -> Summand:
        program = self.program
        outs = [program.floats(f"projection {i}", product.n_out) for i, product in enumerate(core.inputs)]
        for i, product in enumerate(core.inputs):
            self._product(Part.PROJECTIONS, product, sources[i], outs[i], meets=i == len(outs) - 1)

        def source(columns: Columns) -> heads.Source:
            address = outs[columns.product] + 4 * columns.first
            return heads.Source(address, core.inputs[columns.product].n_out, columns.head)

        gate, query, places = core.gate, program.floats("query", core.n_heads * core.dim), self._places()
        heads.add_heads(
            program, core.n_heads, core.n_kv_heads, core.dim, core.v_dim, source(core.q), source(core.k),
            source(core.v), query, places.ctypes.data, scale=core.scale, norm=core.norm, rotary=self._rotary(core.rope),
            clip=core.clip, tuning=core.tuning, v_scale=core.v_scale,
        )  # fmt: skip
        attended = program.floats("attended", core.n_heads * core.v_dim)
        call = attend.add_attention(
            program, core.n_heads, core.n_kv_heads, core.dim, core.v_dim, query, places.ctypes.data, attended,
            sight=core.sight, sinks=core.sinks,
            gate=None if gate is None else attend.Gate(source(gate.columns), gate.n, gate.kind),
        )  # fmt: skip
        self.caches.append(CacheCalls(core.cache, call, places))
        return self._attention_result(attended, core.output)

    def _places(self) -> np.ndarray:
        """A table of its own for one attention."""
        return self.program.zeros(MAX_ROWS * PLACE_SIZE, np.int64).reshape(MAX_ROWS, PLACE_SIZE)

    def _rotary(self, rope: Rope | None) -> heads.Rotary | None:
        return None if rope is None else heads.Rotary(rope.n, rope.first, rope.kind, *self.angles[rope.table])

    def _attention_result(self, attended: int, output: Product) -> Summand:
        out = self.program.floats("attention result", output.n_out)
        self._product(Part.PROJECTIONS, output, self._prepared("attended", attended, output.n_in, output), out)
        return Summand(out)

    def _latent_attention(self, core: LatentAttention, sources: list[Target]) -> Summand:
        program, sizes, places = self.program, core.sizes, self._places()
        query, joined = program.floats("projection 0", core.query.n_out), program.floats("joined", core.down.n_out)
        self._product(Part.PROJECTIONS, core.query, sources[0], query, meets=False)
        if core.index is not None:
            self._index_products(core.index, sources[2:4])
        gate = None if core.gate is None else self._head_gate(core.gate, sources[-1])
        self._product(Part.PROJECTIONS, core.down, sources[1], joined)
        short, source = query, sources[0]
        if core.query_up is not None:
            source = self._prepared("short query", short, core.query_up.n_in, core.query_up, core.query_norm)
            query = program.floats("query up", core.query_up.n_out)
            self._product(Part.PROJECTIONS, core.query_up, source, query, meets=core.index is None)
        if core.up_rows is not None:
            program.keep(core.up_rows)
        absorbed = program.floats("query", sizes.n_heads * (sizes.rank + sizes.rotated))
        chosen = program.floats("chosen", core.top_k) if core.top_k else 0
        index_call = None
        if core.index is not None:
            assert core.query_up is not None
            if core.index.query.format(self.isa_name) != core.query_up.format(self.isa_name):
                source = self._prepared("short query", short, core.index.query.n_in, core.index.query)
            index_call = self._index(core.index, core.top_k, source, places, chosen)
        latent.add_absorption(
            program, sizes, core.up, core.norm, self._rotary(core.rope), query, joined, absorbed,
            places.ctypes.data, scale=core.scale, tuning=core.tuning, rotated_norm=core.rotated_norm,
        )  # fmt: skip
        if index_call is not None:
            index.add_choice(program, index_call)
        gathered = program.floats("gathered", sizes.n_heads * sizes.rank)
        call = attend.add_attention(
            program, sizes.n_heads, 1, sizes.rank, sizes.rank, absorbed, places.ctypes.data, gathered,
            shared=sizes.rotated, top_k=core.top_k, chosen=chosen, gate=gate,
        )  # fmt: skip
        self.caches.append(CacheCalls(core.cache, call, places, index_call))
        attended = program.floats("attended", sizes.n_heads * sizes.v_dim)
        latent.add_expansion(program, sizes, core.up, gathered, attended)
        return self._attention_result(attended, core.output)

    def _head_gate(self, own: HeadGate, source: Target) -> attend.Gate:
        """Adds its product. What a head gathers is multiplied, from which its result is a matrix product."""
        out = self.program.floats("head gates", own.product.n_out)
        self._product(Part.PROJECTIONS, own.product, source, out, meets=False)
        return attend.Gate(heads.Source(out, own.product.n_out, 1), 1, own.kind)

    def _index_products(self, own: Index, sources: list[Target]) -> None:
        """Those of the stream: nothing waits for them before the next one that does."""
        for name, product, source in zip(("key", "weight"), (own.key, own.weights), sources, strict=True):
            out = self.program.floats(f"index {name}", product.n_out)
            self._product(Part.PROJECTIONS, product, source, out, meets=False)

    def _index(self, own: Index, top_k: int, source: Target, places: np.ndarray, chosen: int) -> np.ndarray:
        """The index's query from the short vector, which is prepared at `source`, and what is made of its products."""
        program = self.program
        sizes = index.IndexSizes(own.weights.n_out, own.key.n_out, top_k)
        query = program.floats("index query", own.query.n_out)
        self._product(Part.PROJECTIONS, own.query, source, query)
        return index.add_index(
            program, self._layer, sizes, own.norm, self._rotary(own.rope), query,
            program.floats("index key", sizes.dim), program.floats("index weight", sizes.n_heads), places.ctypes.data,
            chosen, self.isa_name,
        )  # fmt: skip

    def _state_layer(self, core: StateLayer, sources: list[Target]) -> Summand:
        """Projections, what lies between them, and the output projection."""
        outs = self.projections(core)
        for i, product in enumerate(core.inputs):
            self._product(Part.PROJECTIONS, product, sources[i], outs[i], meets=i == len(core.inputs) - 1)
        for (number, product), out in zip(core.behind, outs[len(core.inputs) :], strict=True):
            source = self._prepared(f"behind {number}", outs[number], product.n_in, product)
            self._product(Part.PROJECTIONS, product, source, out)
        return self._attention_result(self.recall(core, outs), core.output)

    def projections(self, core: StateLayer) -> list[int]:
        """Where the results of all projections of a layer with states go, but that of the last."""
        return [self.program.floats(f"projection {i}", product.n_out) for i, product in enumerate(core.projections)]

    def recall(self, core: StateLayer, outs: list[int]) -> int:
        """Adds channels, matrices and norm of a layer with states, from projections at `outs`; returns where the rows
        lie that the output projection reads."""
        program, products = self.program, core.projections

        def of(columns: HeadColumns) -> recurrence.Places:
            at = outs[columns.product]
            return recurrence.Places(tuple(at + 4 * first for first in columns.firsts), products[columns.product].n_out)

        places = program.zeros(MAX_ROWS * STATES_SIZE, np.int64).reshape(MAX_ROWS, STATES_SIZE)
        self.states.append(StateCalls(core.cache, places))
        units = [unit for segment in core.segments for unit in _units(segment, of)]
        n_channels = sum(unit.n for unit in units)
        result = program.floats("channels", n_channels)
        add_channels(
            program, units, result, places.ctypes.data, weight=core.weight, bias=core.bias, has_silu=core.has_silu
        )  # fmt: skip
        if core.recurrence is not None:
            own = core.recurrence
            inputs = recurrence.Inputs(
                result, n_channels, None if own.beta is None else of(own.beta),
                None if own.fades is None else of(own.fades), own.skip,
            )  # fmt: skip
            result = program.floats("recalled", own.heads.n * own.heads.v_dim)
            recurrence.add_recurrence(program, own.rule, own.heads, inputs, own.fading, result, places.ctypes.data)
        if core.norm is not None:
            add_gated_norm(program, core.norm, result, None if core.gate is None else of(core.gate))
        return result


def _units(segment: Segment, of: Callable[[HeadColumns], recurrence.Places]) -> list[Unit]:
    """The channels of a segment: a unit of each head, or one of all where they have no norm and follow each other."""
    columns = of(segment.columns)
    n, row = len(columns.addresses), columns.row
    before, after = ((0,) * n if part is None else of(part).addresses for part in (segment.before, segment.after))
    heads = zip(columns.addresses, before, after, strict=True)
    units = [Unit(segment.dim, source, row, one, other, segment.eps, segment.scale) for source, one, other in heads]
    in_order = all(
        list(part) in ([0] * n, list(range(part[0], part[0] + 4 * segment.dim * n, 4 * segment.dim)))
        for part in (columns.addresses, before, after)
    )
    return [replace(units[0], n=n * segment.dim)] if in_order and not segment.eps else units
