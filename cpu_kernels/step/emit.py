"""From the description of layers to the operations of a program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cpu_kernels.engine.plans import activation_parameters
from cpu_kernels.host.isa import BY_NAME
from cpu_kernels.simd.formats import Format, format_of
from cpu_kernels.step import attend, heads, index, latent, recurrence
from cpu_kernels.step.cached import PLACE_SIZE
from cpu_kernels.step.capped import add_cap
from cpu_kernels.step.channels import Unit, add_channels
from cpu_kernels.step.experts import add_experts, add_scaled_inputs, experts_call
from cpu_kernels.step.gated import add_gated
from cpu_kernels.step.gated_norm import add_gated_norm
from cpu_kernels.step.held_states import STATES_SIZE
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
from cpu_kernels.step.products import PLAIN_FORMAT, Product, Shared, add_product, target_of
from cpu_kernels.step.program import FIRST_ROW, MAX_ROWS, N_ROWS, Part, Program
from cpu_kernels.step.router import add_selection
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
    places: np.ndarray  # int64 [MAX_ROWS, held_states.STATES_SIZE]


@dataclass(slots=True)
class Emitter:
    """Adds layers to a program. pending: results that the next row operation adds to the stream; keep: what the stream
    is multiplied with before."""

    program: Program
    width: int
    isa_name: str
    ropes: tuple[int, ...]
    caches: list[CacheCalls] = field(default_factory=list)
    states: list[StateCalls] = field(default_factory=list)
    active: dict[int, np.ndarray] = field(default_factory=dict)
    pending: list[Summand] = field(default_factory=list)
    keep: float = 1.0
    stream: int = field(init=False)
    angles: list[tuple[int, int]] = field(init=False)
    _shared: Shared = field(init=False)
    _of_head: Shared = field(init=False)
    _layer: int = 0
    _n_names: int = 0

    def __post_init__(self) -> None:
        self._shared = Shared.of(self.program, self.program.state)
        self._of_head = Shared.of(self.program, self.program.head_state)
        self.stream = self.program.floats("stream", self.width)
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
            results += found if arm.post is None else [self._normed_sum(found, arm.post, f" {number}")]
        return results

    def _normed_sum(self, summands: list[Summand], norm: Norm, whose: str = "") -> Summand:
        """Adds the norm of what summands come to."""
        delta, normed = (
            self.program.floats("delta", self.width),
            self.program.floats(f"delta normed{whose}", self.width),
        )
        add_stream(
            self.program, Part.NORMS, self._layer, delta, self.width, keep=0.0, summands=summands, norm=norm,
            out=normed,
        )  # fmt: skip
        return Summand(normed)

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
            return [product.format(self.isa_name) for product in _first_half(core)]
        shared = [product.format(self.isa_name) for mlp in core.shared for product in _first_half(mlp)]
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

    def _written(
        self, rows: int, norm: Norm | None, out: int, forms: list[Format], name: str, keep: float = 1.0,
        summands: Sequence[Summand] = (), width: int = 0,
    ) -> list[Target]:  # fmt: skip
        """Adds a row operation on `rows`, whose result at `out` is written in formats too; where each lies. width: 0:
        the stream's."""
        width = width or self.width
        targets = {form: self._target(name, form, out, width) for form in forms}
        written = [target for form, target in targets.items() if target.address != out]
        add_stream(
            self.program, Part.NORMS, self._layer, rows, width, keep=keep, summands=summands, norm=norm, out=out,
            targets=written,
        )  # fmt: skip
        return [targets[form] for form in forms]

    def _target(self, name: str, form: Format, rows: int, width: int) -> Target:
        """Where rows of floats [width] at `rows` are read in a format: as they lie, where that is the format."""
        target = target_of(self.program, f"{name} {width}", form, width, self.isa_name)
        reads_floats = form == PLAIN_FORMAT and width % 64 == 0
        return Target(target.prepare, rows, 4 * width) if reads_floats else target

    def _prepared(self, name: str, rows: int, width: int, product: Product, norm: Norm | None = None) -> Target:
        """Adds what writes float rows (normalised, if asked) in the format that a product reads."""
        form = product.format(self.isa_name)
        target = self._target(name, form, rows, width)
        if norm is not None or target.address != rows:
            written = () if target.address == rows else (target,)
            add_stream(
                self.program, Part.NORMS, self._layer, rows, width, keep=1.0, norm=norm, targets=written,
            )  # fmt: skip
        return target

    def _product(
        self, part: Part, product: Product, source: Target, out: int, *, meets: bool = True, scale: float = 1.0
    ) -> int:
        return add_product(
            self.program, self._shared, part, product, source, out, self.isa_name, meets=meets, scale=scale
        )

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
        """Projections, channels, matrices, norm and the output projection."""
        program = self.program
        products = [*core.inputs, *(product for _, product in core.behind)]
        outs = [program.floats(f"projection {i}", product.n_out) for i, product in enumerate(products)]
        for i, product in enumerate(core.inputs):
            self._product(Part.PROJECTIONS, product, sources[i], outs[i], meets=i == len(core.inputs) - 1)
        for (number, product), out in zip(core.behind, outs[len(core.inputs) :], strict=True):
            source = self._prepared(f"behind {number}", outs[number], product.n_in, product)
            self._product(Part.PROJECTIONS, product, source, out)

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
        return self._attention_result(result, core.output)

    def _mlp(self, mlp: Mlp, sources: list[Target], part: Part) -> Summand:
        """A dense MLP by itself."""
        number = self._numbers(1)
        switch = self._first_half(mlp, sources, part, number, meets=True)
        source = self._activation(mlp, part, number, meets=True)
        out = self.program.floats(f"dense {number}", mlp.down.n_out)
        self._product(part, mlp.down, source, out)
        return Summand(out, scale=mlp.scale, gate=switch)

    def _moe(self, core: Moe, sources: list[Target], normed: int) -> list[Summand]:
        """Routed and shared experts: what does not depend on each other has no meeting of threads between.

        normed: where the block's input lies as float32 rows.
        """
        program, part, read = self.program, Part.SHARED_EXPERTS, iter(sources)
        switches = []
        first = self._numbers(len(core.shared))
        for number, mlp in enumerate(core.shared, first):
            halves = [next(read) for _ in _first_half(mlp)]
            switches.append(self._first_half(mlp, halves, part, number, meets=False))
        router = self._router_source(core, normed) if core.router_norm is not None else next(read)
        logits, width = program.floats("router logits", core.router.n_out), core.spec.hidden
        self._product(Part.ROUTER, core.router, router, logits)
        top_k = core.selection.top_k
        ids, weights = program.floats("ids", top_k), program.floats("weights", top_k)
        rows = program.floats("expert rows", top_k * width)
        if core.scaled_inputs:
            form = format_of(core.spec.dtype, BY_NAME[self.isa_name])
            source = target_of(program, "scaled input", form, self.width, self.isa_name, top_k)
        else:
            source = self._experts_source(core, next(read, None), normed)
        call = experts_call(
            program, core.spec, top_k, source, 0 if core.scaled_inputs else weights, rows, self.isa_name
        )
        self.active[self._layer] = add_selection(
            program, core.selection, logits, call, core.addresses, ids, weights, meets=not core.shared,
            by_entry=core.scaled_inputs,
        )  # fmt: skip
        results: list[Summand] = []
        prepared = []
        for number, mlp in enumerate(core.shared, first):
            prepared.append(self._activation(mlp, part, number, meets=mlp is core.shared[-1]))
        if core.scaled_inputs:
            add_scaled_inputs(program, self.width, top_k, normed, weights, source)
        for number, (mlp, half, switch) in enumerate(zip(core.shared, prepared, switches, strict=True), first):
            out = program.floats(f"dense {number}", mlp.down.n_out)
            self._product(part, mlp.down, half, out, meets=False)
            results.append(Summand(out, scale=mlp.scale, gate=switch))
        add_experts(program, call)
        routed = Summand(rows, parts=top_k)
        return [routed if core.leave is None else self._leave(core.leave, routed), *results]

    def _router_source(self, core: Moe, rows: int) -> Target:
        """Adds the router's own norm of the block's input."""
        out, form = self.program.floats("normed of router", self.width), core.router.format(self.isa_name)
        return self._written(rows, core.router_norm, out, [form], "input of router")[0]

    def _experts_source(self, core: Moe, given: Target | None, rows: int) -> Target:
        """Where routed experts find their input: `given`, or what a product of that or a norm makes of it."""
        width, form = core.spec.hidden, format_of(core.spec.dtype, BY_NAME[self.isa_name])
        if core.enter is not None:
            assert given is not None
            rows = self.program.floats("entered", width)
            self._product(Part.EXPERTS, core.enter, given, rows)
        elif core.expert_norm is None:
            assert given is not None
            return given
        out = rows if core.expert_norm is None else self.program.floats("normed of experts", width)
        return self._written(rows, core.expert_norm, out, [form], "input of experts", width=width)[0]

    def _leave(self, product: Product, routed: Summand) -> Summand:
        """Adds the product of the sum of what routed experts give."""
        total, width = self.program.floats("sum of experts", product.n_in), product.n_in
        form = product.format(self.isa_name)
        source = self._written(total, None, total, [form], "leaving", 0.0, [routed], width)[0]
        out = self.program.floats("left", product.n_out)
        self._product(Part.EXPERTS, product, source, out)
        return Summand(out)

    def _numbers(self, n: int) -> int:
        """The first of n numbers that nothing else in this branch has: what is named by them lies apart."""
        self._n_names += n
        return self._n_names - n

    def _first_half(self, mlp: Mlp, sources: list[Target], part: Part, number: int, *, meets: bool) -> int:
        """Gate and up projections, and the switch; returns where the switch's logits lie, 0 without."""
        products = _first_half(mlp)
        for i, (product, source) in enumerate(zip(products, sources, strict=True)):
            out = self.program.floats(f"dense {number} half {i}", product.n_out)
            self._product(part, product, source, out, meets=meets and i == len(products) - 1)
        return 0 if mlp.switch is None else self.program.floats(f"dense {number} half {len(products) - 1}", 1)

    def _activation(self, mlp: Mlp, part: Part, number: int, *, meets: bool) -> Target:
        """The activation of a first half, written as `down` reads it."""
        program, inter, form = self.program, mlp.down.n_in, mlp.down.format(self.isa_name)
        target = target_of(program, f"dense {number} {inter}", form, inter, self.isa_name)
        first = program.floats(f"dense {number} half 0", _first_half(mlp)[0].n_out)
        if mlp.fused:
            gate, up = (first, 2 * inter), (first + 4 * inter, 2 * inter)
        elif mlp.gate is not None:
            gate, up = (first, inter), (program.floats(f"dense {number} half 1", inter), inter)
        else:
            gate, up = None, (first, inter)
        parameters = activation_parameters(mlp.activation)
        add_gated(
            program, part, mlp.activation, form, gate, up, inter, target, parameters, self.isa_name, meets=meets
        )  # fmt: skip
        return target


def _first_half(mlp: Mlp) -> tuple[Product, ...]:
    """What reads the MLP's input: gate, up (or both in one), then the switch."""
    return tuple(product for product in (mlp.gate, mlp.up, mlp.switch) if product is not None)


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
