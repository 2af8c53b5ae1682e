"""What the counts are made of: operations, products, tensors and layers."""

import dataclasses

from ahcptq_jax.quantizers.cost import Cost


@dataclasses.dataclass(frozen=True)
class Ops:
    """Operation counts of a layer for one image; sums of layers are totals.

    Attributes:
        macs: pairs of operands multiplied in the plain network: `int_macs + float_macs + shifts + skipped`.
        int_macs: those done as integer multiply-accumulates.
        float_macs: those with a floating-point operand.
        shifts: those done as shift and add (logarithmic codes).
        skipped: those with the code of zero.
        dual_adds: extra adds of HLUQ's second accumulator, one per multiply-accumulate in a hybrid layer.
        corrections: integer adds for zero points: row and column sums, and two per output and accumulator.
        rescales: multiplications of an accumulator by its scale.
        encodes: activations rounded to codes.
        elementwise: additions, multiplications, comparisons on single numbers (norm, softmax, bias, residual).
        transcendentals: exp, erf, rsqrt, sine and cosine.
    """

    macs: int = 0
    int_macs: int = 0
    float_macs: int = 0
    shifts: int = 0
    skipped: int = 0
    dual_adds: int = 0
    corrections: int = 0
    rescales: int = 0
    encodes: int = 0
    elementwise: int = 0
    transcendentals: int = 0

    def __add__(self, other: "Ops") -> "Ops":
        return Ops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Gemm:
    """`repeat` independent products (m, k) x (k, n)."""

    m: int
    k: int
    n: int
    repeat: int = 1

    @property
    def macs(self) -> int:
        return self.m * self.k * self.n * self.repeat


@dataclasses.dataclass(frozen=True)
class Tensor:
    """`elements` numbers of `bits` bits; `on_chip` ones never cross the DRAM interface."""

    elements: int
    bits: int
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Bytes when packed tightly; sub-byte widths are exact up to the last byte."""
        return -(-self.elements * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Operand:
    """Width and number format of one side of a product.

    Attributes:
        bits: width of a number.
        cost: what the quantizer behind its codes costs; None for floating point.
        level_bits: on the grid, width of the whole levels that its codes stand for, which a table at the edge of the
            array turns them into; 0 where the codes themselves take part in the product.
        table_address: bits of the address of that table: of a code, and of the part that a group of channels reads.
    """

    bits: int
    cost: Cost | None = None
    level_bits: int = 0
    table_address: int = 0

    @property
    def is_float(self) -> bool:
        return self.cost is None

    @property
    def arithmetic(self) -> str:
        """What it makes a processing element do (`ahcptq_jax.quantizers.cost.Arithmetic`); "float" without codes."""
        if self.cost is None:
            return "float"
        return "multiply" if self.level_bits else self.cost.arithmetic

    @property
    def product_bits(self) -> int:
        """Width of what a processing element multiplies."""
        return self.level_bits or self.bits

    @property
    def has_groups(self) -> bool:
        """Whether groups of its channels have scales of their own; on the grid they have one step."""
        return self.cost is not None and self.cost.per_group and not self.level_bits

    @property
    def width(self) -> str:
        """For labels: "4", "fp32", or "4(8)" for 4-bit codes of 8-bit levels."""
        levels = f"({self.level_bits})" if self.level_bits else ""
        return f"fp{self.bits}" if self.is_float else f"{self.bits}{levels}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One operation of the graph.

    Attributes:
        path: its parameter path, or the path of what it belongs to plus the operation.
        part: "encoder" (once per image) or "decoder" (all prompts).
        kernel: the group that streams together on the chip.
        kind: linear, conv, attention, relative_position, softmax, activation, norm or elementwise.
        gemm: the product, if it is one.
        a: left operand (activations); None without a product.
        b: right operand (weights, keys or values).
        accumulators: partial sums per output that are rescaled apart (CAG groups, HLUQ's two, AGQ's tau).
        log_levels: logarithmic codes of the left operand, where only some are; else 0.
        ops: operations.
        inputs: activations read, the right operand of an attention product included.
        outputs: activations written.
        weights: parameters read.
        qparam_bits: scales, zero points and group maps read, bits.
        dynamic_b: the right operand is an activation and the last of `inputs`.
    """

    path: str
    part: str
    kernel: str
    kind: str
    gemm: Gemm | None = None
    a: Operand | None = None
    b: Operand | None = None
    accumulators: int = 1
    log_levels: int = 0
    ops: Ops = Ops()
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()
    qparam_bits: int = 0
    dynamic_b: bool = False

    @property
    def is_float(self) -> bool:
        """Whether its product has a floating-point operand."""
        return self.a is not None and self.b is not None and (self.a.is_float or self.b.is_float)

    @property
    def width(self) -> str:
        """Operand widths, such as "4x4" or "fp32xfp32"; "" without a product."""
        return f"{self.a.width}x{self.b.width}" if self.a and self.b else ""

    @property
    def weight_bytes(self) -> int:
        return sum(t.bytes for t in self.weights)

    @property
    def qparam_bytes(self) -> int:
        return -(-self.qparam_bits // 8)

    @property
    def activation_bytes(self) -> int:
        """Bytes read and written at the layer's own interface, on chip or not."""
        return sum(t.bytes for t in (*self.inputs, *self.outputs))

    @property
    def dram_activation_bytes(self) -> int:
        """Those of them that cross the DRAM interface, each tensor once."""
        return sum(t.bytes for t in (*self.inputs, *self.outputs) if not t.on_chip)

    @property
    def reuse(self) -> float:
        """Multiply-accumulates per byte of operands and outputs, each counted once."""
        total = self.weight_bytes + self.qparam_bytes + self.activation_bytes
        return self.ops.macs / total if total else 0.0
