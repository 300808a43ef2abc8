"""What all operations of a layer are made of: row operations, products, and names for what they write."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cpu_kernels.simd.formats import Format
from cpu_kernels.step.products import PLAIN_FORMAT, Product, Shared, add_product, target_of
from cpu_kernels.step.program import Part, Program
from cpu_kernels.step.stream import Norm, Summand, Target, add_stream


@dataclass(slots=True)
class RowEmitter:
    """Adds operations to a program. ropes: angles of each table."""

    program: Program
    width: int
    isa_name: str
    ropes: tuple[int, ...]
    stream: int = field(init=False)
    _shared: Shared = field(init=False)
    _layer: int = 0
    _n_names: int = 0
    _late: list[Summand] = field(default_factory=list)

    def _begin(self) -> None:
        """Makes what all operations share."""
        self._shared = Shared.of(self.program, self.program.state)
        self.stream = self.program.floats("stream", self.width)

    def _kept_sum(self, summands: list[Summand]) -> Summand:
        """Adds what keeps the sum of results until a later branch takes it."""
        kept = self.program.floats(f"kept {len(self._late)}", self.width)
        add_stream(self.program, Part.NORMS, self._layer, kept, self.width, keep=0.0, summands=summands)
        return Summand(kept)

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

    def _numbers(self, n: int) -> int:
        """The first of n numbers that nothing else in this branch has: what is named by them lies apart."""
        self._n_names += n
        return self._n_names - n
