"""Exact counts of what one image with its prompts costs: operations, bytes and reuse, layer by layer.

The graph is the one of `sam_flax`, window padding included; nothing is run. A layer belongs to a kernel: layers of
one kernel stream into each other on the chip, and only tensors that are not `on_chip` cross the DRAM interface.

Integer arithmetic of a quantized product, per pair of an activation and a weight code:

    uniform, grouped   A += w*a                                       one multiply-accumulate
    log2 (AGQ)         A[k mod tau] += v << (K - k div tau)           one shift and one add; nothing for zero
    hybrid (HLUQ)      log code: L += w << (K - k)                    one shift and one add; nothing for zero
                       uniform code: L += w << K and U += w*u         one multiply-accumulate and a dual-path add

and per output one rescale for each accumulator (CAG has one per group), besides the corrections for zero points.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ahcptq_jax.config import QuantConfig
from ahcptq_jax.recipe import site_kind
from hwcost.codes import Histogram, Shares, histograms, hybrid_shares, log2_shares
from hwcost.constants import CONSTANTS, Constants
from sam_flax.config import SamConfig

# What the counts leave out, and why it may matter.
UNMODELLED: tuple[str, ...] = (
    "resizing, normalising and padding of the image (host)",
    "resizing the low-resolution masks to the image, thresholding and run-length encoding (host)",
    "mask prompts: the counted prompts are boxes (mask_downscaling idle, its weights not loaded)",
    "window partition, head splitting and transposes: address generation, no arithmetic",
    "instruction fetch, scheduling, host-accelerator synchronisation and DRAM refresh",
    "routing, control and clock-tree area beyond the utilisation limit",
)

FLOAT = "float"


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
    """Width and number format of one side of a product: a quantizer's kind, "weight", or "float"."""

    bits: int
    kind: str

    @property
    def is_float(self) -> bool:
        return self.kind == FLOAT

    @property
    def width(self) -> str:
        """For labels: "4" or "fp32"."""
        return f"fp{self.bits}" if self.is_float else str(self.bits)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """All layers, in forward order, with what was assumed."""

    sam_config: SamConfig
    quant_config: QuantConfig | None
    prompts: int
    float_bits: int
    layers: tuple[Layer, ...]
    measured_sites: int
    assumed_sites: int
    unmodelled: tuple[str, ...] = UNMODELLED

    @property
    def ops(self) -> Ops:
        """Sum over the layers."""
        return sum((layer.ops for layer in self.layers), Ops())

    def totals(self, part: str | None = None) -> dict[str, Any]:
        """Counts and bytes of everything, or of one part ("encoder", "decoder")."""
        layers = [layer for layer in self.layers if part in (None, layer.part)]
        ops = sum((layer.ops for layer in layers), Ops())
        widths: dict[str, int] = {}
        kinds: dict[str, int] = {}
        for layer in layers:
            if layer.gemm:
                widths[layer.width] = widths.get(layer.width, 0) + layer.ops.macs
                kinds[layer.kind] = kinds.get(layer.kind, 0) + layer.ops.macs
        total: dict[str, Any] = dict(dataclasses.asdict(ops))
        total |= {
            "weight_bytes": sum(layer.weight_bytes for layer in layers),
            "qparam_bytes": sum(layer.qparam_bytes for layer in layers),
            "activation_bytes": sum(layer.activation_bytes for layer in layers),
            "dram_activation_bytes": sum(layer.dram_activation_bytes for layer in layers),
            "parameters": sum(t.elements for layer in layers for t in layer.weights),
            "macs_by_width": widths,
            "macs_by_kind": kinds,
        }
        moved = total["weight_bytes"] + total["qparam_bytes"] + total["dram_activation_bytes"]
        total["macs_per_dram_byte"] = ops.macs / moved if moved else 0.0
        return total


def count(
    sam_config: SamConfig,
    quant_config: QuantConfig | None = None,
    codes: Mapping[str, Any] | None = None,
    *,
    prompts: int = 1,
    float_bits: int = 32,
    constants: Constants = CONSTANTS,
) -> Counts:
    """Counts one image with `prompts` box prompts.

    Args:
        sam_config: the model.
        quant_config: the quantization; None is the floating-point model.
        codes: measured code histograms, {site path: counts or `Histogram`} (see `hwcost.codes`); sites without one
            take the assumed shares `hluq_zero_share`, `hluq_multiply_share`, `agq_zero_share`, `agq_tau`.
        prompts: boxes decoded for the image.
        float_bits: width of what stays in floating point, 16 or 32.
        constants: where the assumed shares come from.

    Returns:
        The layers. Rounded where shares multiply counts, exact otherwise.

    Raises:
        ValueError: if an argument is out of range or a histogram's site is unknown or has other bits.
    """
    if prompts < 1:
        raise ValueError(f"prompts={prompts} must be at least 1.")
    if float_bits not in (16, 32):
        raise ValueError(f"float_bits={float_bits} must be 16 or 32.")
    measured = histograms(codes or {})
    builder = _Builder(sam_config, quant_config, measured, prompts, float_bits, constants)
    builder.encoder()
    builder.decoder()
    unknown = sorted(set(measured) - builder.histogram_sites)
    if unknown:
        raise ValueError(f"Histograms name sites that do not shift, such as {unknown[0]}; measure this model's.")
    return Counts(
        sam_config=sam_config,
        quant_config=quant_config,
        prompts=prompts,
        float_bits=float_bits,
        layers=tuple(builder.layers),
        measured_sites=len(set(measured)),
        assumed_sites=len(builder.histogram_sites - set(measured)),
    )


# Operations per number of our own forward, as XLA counts them.
_NORM_OPS = 8  # two means, deviation, its square, subtraction, scale, its factor, bias
_SOFTMAX_OPS = 4  # maximum, subtraction, sum, division; besides the exponential
_GELU_OPS = 4  # 0.5 * x * erfc(-x * sqrt(0.5)); besides the error function


class _Builder:
    """Collects layers in forward order."""

    def __init__(
        self,
        sam_config: SamConfig,
        quant_config: QuantConfig | None,
        measured: Mapping[str, Histogram],
        prompts: int,
        float_bits: int,
        constants: Constants,
    ) -> None:
        self.config, self.quant, self.measured = sam_config, quant_config, measured
        self.prompts, self.float_bits, self.constants = prompts, float_bits, constants
        self.layers: list[Layer] = []
        self.histogram_sites: set[str] = set()
        self.part = "encoder"

    # Operands

    def site(self, path: str) -> Operand:
        """Format of the activations behind a site."""
        kind = None if self.quant is None else site_kind(path, self.quant)
        if kind is None or self.quant is None:
            return Operand(self.float_bits, FLOAT)
        return Operand(self.quant.a_bits, kind)

    def weight(self, input_operand: Operand) -> Operand:
        """Weights are quantized exactly where their layer's input is."""
        if input_operand.is_float or self.quant is None:
            return Operand(self.float_bits, FLOAT)
        return Operand(self.quant.w_bits, "weight")

    def groups(self, operand: Operand, channels: int) -> int:
        """Scales along the channels of an activation."""
        if operand.kind != "grouped" or self.quant is None:
            return 1
        return min(self.quant.groups or channels, channels)

    def site_qparam_bits(self, operand: Operand, channels: int) -> int:
        """Scales in the float width, zero points and level counts in the code width, group labels in log2(G) bits."""
        if operand.is_float:
            return 0
        groups, scale, code = self.groups(operand, channels), self.float_bits, operand.bits
        return {
            "uniform": scale + code,
            "grouped": groups * (scale + code) + channels * math.ceil(math.log2(groups)),
            "hybrid": 3 * scale + code,  # minimum, both scales; number of log levels
            "log2": scale + 2,  # tau is one of three
        }[operand.kind]

    def shares(self, path: str, operand: Operand) -> tuple[Shares, int]:
        """What the processing element does with the codes of a site, and the accumulators that it needs."""
        if operand.kind not in ("hybrid", "log2"):
            return Shares(multiply=1.0), 1
        self.histogram_sites.add(path)
        histogram, values = self.measured.get(path), self.constants
        if histogram is not None and len(histogram.counts) != 2**operand.bits:
            raise ValueError(f"The histogram of {path} has {len(histogram.counts)} codes, not 2^{operand.bits}.")
        if operand.kind == "hybrid":
            if histogram is not None:
                return hybrid_shares(histogram), 2
            zero, multiply = values["hluq_zero_share"], values["hluq_multiply_share"]
            return Shares(shift=1.0 - zero - multiply, zero=zero, multiply=multiply), 2
        tau = histogram.tau if histogram is not None and histogram.tau else round(values["agq_tau"])
        if histogram is not None:
            return log2_shares(histogram), tau
        zero = values["agq_zero_share"]
        return Shares(shift=1.0 - zero, zero=zero), tau

    # Layers

    def add(self, path: str, kernel: str, kind: str, **fields: Any) -> None:
        self.layers.append(Layer(path=path, part=self.part, kernel=kernel, kind=kind, **fields))

    def plain(
        self,
        path: str,
        kernel: str,
        kind: str,
        elements: int,
        per_element: int,
        *,
        transcendentals: int = 0,
        parameters: int = 0,
        reads: tuple[int, ...] = (),
        writes: tuple[int, ...] = (),
        encodes: int = 0,
    ) -> None:
        """An operation on single numbers; `reads` and `writes` count those that cross the DRAM interface."""
        bits = self.float_bits
        self.add(
            path,
            kernel,
            kind,
            ops=Ops(elementwise=elements * per_element, transcendentals=transcendentals, encodes=encodes),
            inputs=tuple(Tensor(n, bits) for n in reads) if reads else (Tensor(elements, bits, on_chip=True),),
            outputs=tuple(Tensor(n, bits) for n in writes) if writes else (Tensor(elements, bits, on_chip=True),),
            weights=(Tensor(parameters, bits),) if parameters else (),
        )

    def product(
        self,
        path: str,
        kernel: str,
        kind: str,
        gemm: Gemm,
        a: Operand,
        b: Operand,
        *,
        a_site: str = "",
        a_elements: int | None = None,
        a_on_chip: bool = False,
        out: Operand | None = None,
        out_on_chip: bool = False,
        dynamic_b: bool = False,
        b_on_chip: bool = False,
        bias: int = 0,
        parameters: int | None = None,
        encodes: int = 0,
        qparam_bits: int = 0,
        elementwise: int = 0,
    ) -> None:
        """A matrix product; `out` is the format of what it writes (float by default)."""
        out = out or Operand(self.float_bits, FLOAT)
        integer = not (a.is_float or b.is_float)
        outputs = gemm.m * gemm.n * gemm.repeat
        left, right = gemm.m * gemm.k * gemm.repeat, gemm.k * gemm.n * gemm.repeat
        accumulators = 1
        if integer:
            shares, accumulators = self.shares(a_site, a)
            accumulators = max(accumulators, self.groups(a, gemm.k))
            shifts, skipped = round(gemm.macs * shares.shift), round(gemm.macs * shares.zero)
            int_macs = gemm.macs - shifts - skipped
            # Both operands are asymmetric: sum (a - za)(b - zb) needs the sums of each; a weight's is known beforehand.
            corrections = left + (right if dynamic_b else 0) + 2 * outputs * accumulators
            ops = Ops(
                macs=gemm.macs,
                int_macs=int_macs,
                shifts=shifts,
                skipped=skipped,
                dual_adds=int_macs if a.kind == "hybrid" else 0,
                corrections=corrections,
                rescales=outputs * accumulators,
                encodes=encodes,
                elementwise=outputs * bool(bias) + elementwise,
            )
        else:
            ops = Ops(
                macs=gemm.macs,
                float_macs=gemm.macs,
                encodes=encodes,
                elementwise=outputs * bool(bias) + elementwise,
            )
        inputs = [Tensor(left if a_elements is None else a_elements, a.bits, a_on_chip)]
        weights: list[Tensor] = []
        if dynamic_b:
            inputs.append(Tensor(right, b.bits, b_on_chip))
        else:
            weights.append(Tensor(gemm.k * gemm.n if parameters is None else parameters, b.bits))
            if bias:
                weights.append(Tensor(bias, self.float_bits))
            if not b.is_float:
                qparam_bits += gemm.n * (self.float_bits + b.bits)  # a scale and a zero point per output channel
        self.add(
            path,
            kernel,
            kind,
            gemm=gemm,
            a=a,
            b=b,
            accumulators=accumulators,
            ops=ops,
            inputs=tuple(inputs),
            outputs=(Tensor(outputs, out.bits, out_on_chip),),
            weights=tuple(weights),
            qparam_bits=qparam_bits + (self.site_qparam_bits(a, gemm.k) if integer and a_site else 0),
            dynamic_b=dynamic_b,
        )

    def linear(
        self,
        path: str,
        kernel: str,
        rows: int,
        channels: int,
        features: int,
        *,
        a_on_chip: bool = False,
        out: Operand | None = None,
        out_on_chip: bool = False,
        encode_out: Operand | None = None,
        bias: bool = True,
        kind: str = "linear",
    ) -> Operand:
        """A linear layer behind the site `<path>/input`; its input is encoded here where it is quantized.

        `encode_out` is the format of a site behind the layer, whose codes are what is written.
        """
        site = f"{path}/input"
        a = self.site(site)
        b = self.weight(a)
        out = encode_out or out
        # A quantized input that comes from DRAM was encoded by its producer; counting it here once is the same.
        encodes = 0 if a.is_float else rows * channels
        if encode_out is not None and not encode_out.is_float:
            encodes += rows * features
        self.product(
            path,
            kernel,
            kind,
            Gemm(rows, channels, features),
            a,
            b,
            a_site=site,
            a_on_chip=a_on_chip,
            out=out,
            out_on_chip=out_on_chip,
            bias=features if bias else 0,
            encodes=encodes,
        )
        return a

    def norm(self, path: str, kernel: str, rows: int, channels: int, **kwargs: Any) -> None:
        elements = rows * channels
        self.plain(
            path, kernel, "norm", elements, _NORM_OPS, transcendentals=rows, parameters=2 * channels, **kwargs
        )

    # The encoder

    def encoder(self) -> None:
        self.part = "encoder"
        c = self.config
        tokens, dim = c.grid**2, c.embed_dim
        path = "image_encoder/patch_embed/proj"
        float_ = Operand(self.float_bits, FLOAT)
        patch = c.patch_size**2 * 3
        self.product(
            path, path, "conv", Gemm(tokens, patch, dim), float_, float_, bias=dim, out_on_chip=True
        )
        self.plain(
            "image_encoder/pos_embed", path, "elementwise", tokens * dim, 1,
            parameters=tokens * dim, writes=(tokens * dim,),
        )  # fmt: skip
        for index in range(c.depth):
            self.encoder_block(index)
        self.neck()

    def encoder_block(self, index: int) -> None:
        c = self.config
        block, window = f"image_encoder/blocks_{index}", c.block_window(index)
        side = window or c.grid
        windows = (-(-c.grid // window)) ** 2 if window else 1
        tokens, padded, dim = c.grid**2, windows * side**2, c.embed_dim
        attn = f"{block}/attn"
        q, k, v = (self.site(f"{attn}/{name}") for name in "qkv")

        kernel = f"{attn}/qkv"
        self.norm(f"{block}/norm1", kernel, tokens, dim, reads=(tokens * dim,))
        self.linear(kernel, kernel, padded, dim, 3 * dim, a_on_chip=True, encode_out=q)
        self.core(attn, heads=c.num_heads * windows, queries=side**2, keys=side**2, dim=c.head_dim, positions=side)
        kernel = f"{attn}/proj"
        self.linear(kernel, kernel, padded, dim, dim, out_on_chip=True)
        self.plain(
            f"{attn}/residual", kernel, "elementwise", tokens * dim, 1, reads=(tokens * dim,), writes=(tokens * dim,)
        )

        hidden = int(dim * c.mlp_ratio)
        kernel = f"{block}/mlp/lin1"
        self.norm(f"{block}/norm2", kernel, tokens, dim, reads=(tokens * dim,))
        self.linear(kernel, kernel, tokens, dim, hidden, a_on_chip=True, out_on_chip=True)
        self.activation(f"{block}/mlp", kernel, tokens * hidden, "gelu")
        kernel = f"{block}/mlp/lin2"
        self.linear(kernel, kernel, tokens, hidden, dim, out_on_chip=True)
        self.plain(
            f"{block}/mlp/residual", kernel, "elementwise", tokens * dim, 1,
            reads=(tokens * dim,), writes=(tokens * dim,),
        )  # fmt: skip

    def activation(self, mlp: str, kernel: str, elements: int, kind: str) -> None:
        """GELU or ReLU between the two linears; what it writes has the format of the second's input."""
        out = self.site(f"{mlp}/lin2/input")
        gelu = kind == "gelu"
        self.add(
            f"{mlp}/{kind}",
            kernel,
            "activation",
            ops=Ops(elementwise=elements * (_GELU_OPS if gelu else 1), transcendentals=elements * gelu),
            inputs=(Tensor(elements, self.float_bits, on_chip=True),),
            outputs=(Tensor(elements, out.bits),),
        )

    def core(self, attn: str, *, heads: int, queries: int, keys: int, dim: int, positions: int = 0) -> None:
        """Scores, softmax and weighted sum; the attention map stays on the chip, rows at a time.

        Args:
            heads: independent maps (heads, windows, prompts).
            queries: rows of each.
            keys: columns of each.
            dim: width of a head.
            positions: side of the token grid for relative positions, 0 without.
        """
        kernel = f"{attn}/core"
        q, k, v, a = (self.site(f"{attn}/{name}") for name in ("q", "k", "v", "softmax"))
        out = self.site(f"{attn}/{'proj' if positions else 'out_proj'}/input")
        scores = heads * queries * keys
        if positions:
            float_ = Operand(self.float_bits, FLOAT)
            for axis in "hw":
                # Row i of the grid meets its own table: `positions` products of (positions, dim) x (dim, positions).
                self.product(
                    f"{attn}/rel_pos_{axis}",
                    kernel,
                    "relative_position",
                    Gemm(positions, dim, positions, repeat=heads * positions),
                    q if self.quant is not None else float_,
                    float_,
                    a_on_chip=True,
                    out_on_chip=True,
                    parameters=(2 * positions - 1) * dim,
                )
        self.product(
            f"{attn}/qk",
            kernel,
            "attention",
            Gemm(queries, dim, keys, repeat=heads),
            q,
            k,
            dynamic_b=True,
            out_on_chip=True,
            elementwise=heads * queries * dim,  # the factor 1/sqrt(dim)
            qparam_bits=self.site_qparam_bits(q, dim) + self.site_qparam_bits(k, dim),
        )
        self.add(
            f"{attn}/softmax",
            kernel,
            "softmax",
            ops=Ops(
                elementwise=scores * (_SOFTMAX_OPS + (2 if positions else 0)),  # two biases are added to each score
                transcendentals=scores,
                encodes=0 if a.is_float else scores,
            ),
            inputs=(Tensor(scores, self.float_bits, on_chip=True),),
            outputs=(Tensor(scores, a.bits, on_chip=True),),
        )
        self.product(
            f"{attn}/av",
            kernel,
            "attention",
            Gemm(queries, keys, dim, repeat=heads),
            a,
            v,
            a_site=f"{attn}/softmax",
            a_on_chip=True,
            out=out,
            dynamic_b=True,
            qparam_bits=self.site_qparam_bits(v, dim),
        )

    def neck(self) -> None:
        c = self.config
        tokens, dim, out = c.grid**2, c.embed_dim, c.out_chans
        neck = "image_encoder/neck"
        conv1, conv2 = f"{neck}/conv1", f"{neck}/conv2"
        a = self.site(f"{conv1}/input")
        self.linear(conv1, conv1, tokens, dim, out, out_on_chip=True, bias=False, kind="conv")
        # The residual stream arrives in floating point and is encoded on the way in.
        self.layers[-1] = dataclasses.replace(self.layers[-1], inputs=(Tensor(tokens * dim, self.float_bits),))
        b = self.site(f"{conv2}/input")
        self.norm(f"{neck}/norm1", conv1, tokens, out)
        self.layers[-1] = dataclasses.replace(self.layers[-1], outputs=(Tensor(tokens * out, b.bits),))
        # The 3x3 convolution reads each input nine times from the buffer but once from DRAM.
        self.product(
            conv2,
            conv2,
            "conv",
            Gemm(tokens, 9 * out, out),
            b,
            self.weight(b),
            a_site=f"{conv2}/input",
            a_elements=tokens * out,
            out_on_chip=True,
            encodes=0 if b.is_float else tokens * out,
        )
        self.norm(f"{neck}/norm2", conv2, tokens, out, writes=(tokens * out,))
        del a

    # The decoder; rows of all prompts share one product, so weights are read once for all prompts.

    def decoder(self) -> None:
        self.part = "decoder"
        c, n = self.config, self.prompts
        image, dim = c.grid**2, c.out_chans
        masks = c.num_multimask_outputs + 1
        tokens = 1 + masks + 2  # IoU token, mask tokens, two corners of a box
        float_ = Operand(self.float_bits, FLOAT)

        path = "prompt_encoder/pe_layer"
        # Positional encoding of the two corners of each box and, once per call, of every image token.
        for name, rows in (("boxes", 2 * n), ("dense", image)):
            self.product(
                f"{path}/{name}", path, "linear", Gemm(rows, 2, dim // 2), float_, float_,
                parameters=dim if name == "boxes" else 0, out_on_chip=True, elementwise=4 * rows,
            )  # fmt: skip
        self.plain(
            f"{path}/sincos", path, "elementwise", (2 * n + image) * (dim // 2), 1,
            transcendentals=(2 * n + image) * dim,
            parameters=4 * dim + 2 * dim,  # point and box embeddings, not_a_point_embed, no_mask_embed
            writes=((2 * n + image) * dim,),
        )  # fmt: skip
        path = "mask_decoder/embed"
        self.plain(
            path, path, "elementwise", n * image * dim, 1, parameters=(1 + masks) * dim,
            reads=(image * dim,), writes=(n * image * dim,),
        )  # fmt: skip

        for index in range(c.decoder_depth):
            self.two_way_block(f"mask_decoder/transformer/layers_{index}", index, tokens)
        final = "mask_decoder/transformer/final_attn_token_to_image"
        self.cross_attention(final, tokens, image, queries_add=True, keys_add=True)
        self.norm("mask_decoder/transformer/norm_final_attn", f"{final}/out_proj", n * tokens, dim)

        path = "mask_decoder/output_upscaling"
        kernel = f"{path}/conv1"
        self.product(
            kernel, kernel, "conv", Gemm(n * image, dim, dim), float_, float_, bias=dim // 4, out_on_chip=True
        )
        self.norm(f"{path}/norm1", kernel, n * image * 4, dim // 4)
        up = n * image * dim
        self.plain(f"{path}/gelu1", kernel, "activation", up, _GELU_OPS, transcendentals=up, writes=(up,))
        kernel = f"{path}/conv2"
        self.product(
            kernel, kernel, "conv", Gemm(n * image * 4, dim // 4, dim // 2), float_, float_,
            bias=dim // 8, out_on_chip=True,
        )  # fmt: skip
        up *= 2
        self.plain(f"{path}/gelu2", kernel, "activation", up, _GELU_OPS, transcendentals=up, writes=(up,))

        for index in range(masks):
            self.mlp(f"mask_decoder/output_hypernetworks_mlps_{index}", (dim, dim, dim, dim // 8))
        hidden = c.iou_head_hidden_dim
        self.mlp("mask_decoder/iou_prediction_head", (dim, *[hidden] * (c.iou_head_depth - 1), masks))
        path = "mask_decoder/masks"
        self.product(
            path, path, "attention", Gemm(masks, dim // 8, 16 * image, repeat=n), float_, float_, dynamic_b=True
        )

    def mlp(self, path: str, sizes: tuple[int, ...]) -> None:
        """A small MLP with ReLU on one token of each prompt."""
        n = self.prompts
        for j, (channels, features) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            self.linear(f"{path}/layers_{j}", path, n, channels, features, a_on_chip=j > 0, out_on_chip=True)
            if j < len(sizes) - 2:
                self.plain(f"{path}/relu_{j}", path, "activation", n * features, 1)

    def two_way_block(self, block: str, index: int, tokens: int) -> None:
        c, n = self.config, self.prompts
        image, dim, heads = c.grid**2, c.out_chans, c.decoder_num_heads
        attn = f"{block}/self_attn"
        rows = n * tokens
        if index:
            self.plain(f"{attn}/query_pe", f"{attn}/q_proj", "elementwise", rows * dim, 1)
        for name in "qkv":
            path = f"{attn}/{name}_proj"
            self.linear(path, path, rows, dim, dim, encode_out=self.site(f"{attn}/{name}"))
        self.core(attn, heads=n * heads, queries=tokens, keys=tokens, dim=dim // heads)
        path = f"{attn}/out_proj"
        self.linear(path, path, rows, dim, dim, out_on_chip=True)
        if index:
            self.plain(f"{attn}/residual", path, "elementwise", rows * dim, 1, reads=(rows * dim,))
        self.norm(f"{block}/norm1", path, rows, dim, writes=(rows * dim,))

        attn = f"{block}/cross_attn_token_to_image"
        self.cross_attention(attn, tokens, image, queries_add=True, keys_add=True)
        self.norm(f"{block}/norm2", f"{attn}/out_proj", rows, dim, writes=(rows * dim,))

        mlp = f"{block}/mlp"
        self.linear(f"{mlp}/lin1", f"{mlp}/lin1", rows, dim, c.decoder_mlp_dim, out_on_chip=True)
        self.activation(mlp, f"{mlp}/lin1", rows * c.decoder_mlp_dim, "relu")
        self.linear(f"{mlp}/lin2", f"{mlp}/lin2", rows, c.decoder_mlp_dim, dim, out_on_chip=True)
        self.plain(f"{mlp}/residual", f"{mlp}/lin2", "elementwise", rows * dim, 1, reads=(rows * dim,))
        self.norm(f"{block}/norm3", f"{mlp}/lin2", rows, dim, writes=(rows * dim,))

        attn = f"{block}/cross_attn_image_to_token"
        self.cross_attention(attn, image, tokens, queries_add=False, keys_add=True)
        self.norm(f"{block}/norm4", f"{attn}/out_proj", n * image, dim, writes=(n * image * dim,))

    def cross_attention(self, attn: str, queries: int, keys: int, *, queries_add: bool, keys_add: bool) -> None:
        """Half-width attention between tokens and image; positional encodings are added to queries and keys."""
        c, n = self.config, self.prompts
        dim, heads = c.out_chans, c.decoder_num_heads
        inner = dim // 2
        # Token-to-image adds to both sides; image-to-token takes its queries, `keys + pe`, from the step before.
        if queries_add:
            self.plain(f"{attn}/query_pe", f"{attn}/q_proj", "elementwise", n * queries * dim, 1)
        if keys_add:
            self.plain(f"{attn}/key_pe", f"{attn}/k_proj", "elementwise", n * keys * dim, 1)
        for name, rows in (("q", n * queries), ("k", n * keys), ("v", n * keys)):
            path = f"{attn}/{name}_proj"
            self.linear(path, path, rows, dim, inner, encode_out=self.site(f"{attn}/{name}"))
        self.core(attn, heads=n * heads, queries=queries, keys=keys, dim=inner // heads)
        path = f"{attn}/out_proj"
        self.linear(path, path, n * queries, inner, dim, out_on_chip=True)
        self.plain(f"{attn}/residual", path, "elementwise", n * queries * dim, 1, reads=(n * queries * dim,))
