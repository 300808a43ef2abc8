"""Dense MLPs, routed experts and shared ones as operations of a program."""

from dataclasses import dataclass, field

import numpy as np

from cpu_kernels.engine.plans import activation_parameters
from cpu_kernels.host.isa import BY_NAME
from cpu_kernels.simd.formats import format_of
from cpu_kernels.step.emit_rows import RowEmitter
from cpu_kernels.step.experts import add_experts, add_identities, add_scaled_inputs, experts_call
from cpu_kernels.step.gated import add_gated
from cpu_kernels.step.parts import Mlp, Moe
from cpu_kernels.step.products import Product, target_of
from cpu_kernels.step.program import Part
from cpu_kernels.step.router import add_selection
from cpu_kernels.step.stream import Summand, Target


@dataclass(slots=True)
class ExpertsEmitter(RowEmitter):
    """Adds MLPs and experts. active: by layer, int64 [1], the experts activated so far."""

    active: dict[int, np.ndarray] = field(default_factory=dict)

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
            halves = [next(read) for _ in first_half(mlp)]
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
        has_identities = core.router.n_out > len(core.addresses)
        self.active[self._layer] = add_selection(
            program, core.selection, core.router.n_out, logits, call, core.addresses, ids, weights,
            meets=not core.shared or has_identities, by_entry=core.scaled_inputs,
        )  # fmt: skip
        if has_identities:
            add_identities(program, width, len(core.addresses), top_k, normed, ids, weights, rows)
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

    def _first_half(self, mlp: Mlp, sources: list[Target], part: Part, number: int, *, meets: bool) -> int:
        """Gate and up projections, and the switch; returns where the switch's logits lie, 0 without."""
        products = first_half(mlp)
        for i, (product, source) in enumerate(zip(products, sources, strict=True)):
            out = self.program.floats(f"dense {number} half {i}", product.n_out)
            self._product(part, product, source, out, meets=meets and i == len(products) - 1)
        return 0 if mlp.switch is None else self.program.floats(f"dense {number} half {len(products) - 1}", 1)

    def _activation(self, mlp: Mlp, part: Part, number: int, *, meets: bool) -> Target:
        """The activation of a first half, written as `down` reads it."""
        program, inter, form = self.program, mlp.down.n_in, mlp.down.format(self.isa_name)
        target = target_of(program, f"dense {number} {inter}", form, inter, self.isa_name)
        first = program.floats(f"dense {number} half 0", first_half(mlp)[0].n_out)
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


def first_half(mlp: Mlp) -> tuple[Product, ...]:
    """What reads the MLP's input: gate, up (or both in one), then the switch."""
    return tuple(product for product in (mlp.gate, mlp.up, mlp.switch) if product is not None)
