"""Turns shapes and sites into layers: the arithmetic behind each kind of operation, and what it reads and writes."""

import math
from collections.abc import Mapping
from typing import Any

from hwcost.counts.arithmetic import Work, work_of
from hwcost.counts.codes import AssumedCodes, Histogram
from hwcost.counts.costs import Gemm, Layer, Operand, Ops, Tensor
from hwcost.counts.formats import Formats

# Operations per number of our own forward, as XLA counts them.
NORM_OPS = 8  # two means, deviation, its square, subtraction, scale, its factor, bias
SOFTMAX_OPS = 4  # maximum, subtraction, sum, division; besides the exponential
GELU_OPS = 4  # 0.5 * x * erfc(-x * sqrt(0.5)); besides the error function


class Builder:
    """Collects the layers of one model in forward order.

    Attributes:
        layers: what was added so far.
        histogram_sites: sites met whose codes decide between shift, multiply and skip.
        part: "encoder" or "decoder", of the layers to come.
    """

    def __init__(
        self,
        formats: Formats,
        measured: Mapping[str, Histogram],
        assumed: AssumedCodes,
    ) -> None:
        self.formats, self.measured, self.assumed = formats, measured, assumed
        self.quant, self.float_bits = formats.quant, formats.float_bits
        self.layers: list[Layer] = []
        self.histogram_sites: set[str] = set()
        self.part = "encoder"
        self.float = Operand(self.float_bits)

    # Formats

    def site(self, path: str) -> Operand:
        """Format of the activations behind a site."""
        return self.formats.site(path)

    def weight(self, site: str) -> Operand:
        """Format of the weights of the layer behind a site: they are quantized exactly where its input is."""
        return self.formats.weight(site)

    def groups(self, operand: Operand, channels: int) -> int:
        """Number of scales along the channels of an activation."""
        if not operand.has_groups or self.quant is None:
            return 1
        return min(self.quant.groups or channels, channels)

    def site_qparam_bits(self, operand: Operand, channels: int) -> int:
        """Bits of a site's quantizer: scales in the float width, whole numbers in the code width, group labels."""
        if operand.cost is None or self.quant is None:
            return 0
        if operand.level_bits:
            # Step, offset, the table, and for each channel the part of it that its group reads.
            table = 2**operand.table_address * operand.level_bits
            return 2 * self.float_bits + table + channels * (operand.table_address - operand.bits)
        groups, cost = self.groups(operand, channels), operand.cost
        each = cost.scales * self.float_bits + cost.codes * operand.bits + cost.more_bits
        return groups * each + (channels * math.ceil(math.log2(groups)) if operand.has_groups else 0)

    def work(self, path: str, operand: Operand, channels: int) -> Work:
        """What the processing element does with the codes of a site, measured where there is a histogram."""
        if operand.cost is None or not operand.cost.depends_on_codes:
            return Work(accumulators=self.groups(operand, channels))
        self.histogram_sites.add(path)
        return work_of(operand, path, self.measured.get(path), self.assumed)

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
        written: Operand | None = None,
    ) -> None:
        """An operation on single numbers; `reads` and `writes` count those that cross the DRAM interface.

        `written` is the format of what is written, floating point by default.
        """
        bits, out_bits = self.float_bits, (written or self.float).bits
        self.add(
            path,
            kernel,
            kind,
            ops=Ops(elementwise=elements * per_element, transcendentals=transcendentals),
            inputs=tuple(Tensor(n, bits) for n in reads) if reads else (Tensor(elements, bits, on_chip=True),),
            outputs=tuple(Tensor(n, out_bits) for n in writes)
            if writes
            else (Tensor(elements, out_bits, on_chip=True),),
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
        source: Tensor | None = None,
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
        """A matrix product.

        Args:
            gemm: its shape.
            a: format of the left operand, `a_site` its site if it has one.
            b: format of the right operand.
            source: the left operand as it arrives, where that is not its (m, k) in its own format.
            out: format of what is written, floating point by default.
            dynamic_b: the right operand is an activation, not a parameter.
            bias: numbers added to each row.
            parameters: numbers read for the right operand, where that is not (k, n).
            encodes, qparam_bits, elementwise: what comes on top of the product.
        """
        out = out or self.float
        outputs = gemm.m * gemm.n * gemm.repeat
        left, right = gemm.m * gemm.k * gemm.repeat, gemm.k * gemm.n * gemm.repeat
        work = Work()
        own = Ops(encodes=encodes, elementwise=elementwise + outputs * bool(bias))
        if a.is_float or b.is_float:
            ops = own + Ops(macs=gemm.macs, float_macs=gemm.macs)
        else:
            work = self.work(a_site, a, gemm.k)
            # Both operands are asymmetric: sum (a-za)(b-zb) needs the sums of each; a weight's is known beforehand.
            ops = own + work.ops(gemm.macs, outputs, sums=left + (right if dynamic_b else 0))
            qparam_bits += self.site_qparam_bits(a, gemm.k) if a_site else 0
        inputs, weights = [source or Tensor(left, a.bits)], ()
        if dynamic_b:
            inputs.append(Tensor(right, b.bits, b_on_chip))
        else:
            read = gemm.k * gemm.n if parameters is None else parameters
            weights = (Tensor(read, b.bits), *((Tensor(bias, self.float_bits),) if bias else ()))
            # A scale and a zero point for each output channel.
            qparam_bits += 0 if b.is_float else gemm.n * (self.float_bits + b.bits)
        self.add(
            path, kernel, kind, gemm=gemm, a=a, b=b, accumulators=work.accumulators, log_levels=work.log_levels,
            ops=ops, inputs=tuple(inputs), outputs=(Tensor(outputs, out.bits, out_on_chip),), weights=weights,
            qparam_bits=qparam_bits, dynamic_b=dynamic_b,
        )  # fmt: skip

    def linear(
        self,
        path: str,
        kernel: str,
        rows: int,
        channels: int,
        features: int,
        *,
        codes_arrive: bool = False,
        a_on_chip: bool = False,
        out_site: str = "",
        out_on_chip: bool = False,
        bias: bool = True,
        kind: str = "linear",
    ) -> None:
        """A linear layer behind the site `<path>/input`, where its input is encoded.

        Args:
            codes_arrive: the producer encoded the input already, so that codes are read and not floats.
            a_on_chip: the input comes from the layer before and crosses no DRAM interface.
            out_site: the site behind the layer, whose codes are what is written.
        """
        site = f"{path}/input"
        a, out = self.site(site), self.site(out_site) if out_site else self.float
        # An input that arrives as codes was encoded by its producer; counting it here, once, is the same.
        encodes = 0 if a.is_float else rows * channels
        if not out.is_float:
            encodes += rows * features
        bits = a.bits if codes_arrive else self.float_bits
        self.product(
            path,
            kernel,
            kind,
            Gemm(rows, channels, features),
            a,
            self.weight(site),
            a_site=site,
            source=Tensor(rows * channels, bits, a_on_chip),
            out=out,
            out_on_chip=out_on_chip,
            bias=features if bias else 0,
            encodes=encodes,
        )

    def norm(self, path: str, kernel: str, rows: int, channels: int, **kwargs: Any) -> None:
        """LayerNorm of `rows` vectors; keyword arguments as in `plain`."""
        elements = rows * channels
        self.plain(path, kernel, "norm", elements, NORM_OPS, transcendentals=rows, parameters=2 * channels, **kwargs)

    def activation(self, mlp: str, kernel: str, elements: int, kind: str) -> None:
        """GELU or ReLU between the two linears; what it writes has the format of the second's input."""
        gelu = kind == "gelu"
        self.plain(
            f"{mlp}/{kind}",
            kernel,
            "activation",
            elements,
            GELU_OPS if gelu else 1,
            transcendentals=elements * gelu,
            writes=(elements,),
            written=self.site(f"{mlp}/lin2/input"),
        )

    def attention(
        self, attn: str, *, heads: int, queries: int, keys: int, dim: int, positions: int = 0, out_site: str
    ) -> None:
        """Scores, softmax and weighted sum; the attention map stays on the chip, rows at a time.

        Args:
            attn: path of the attention.
            heads: independent maps (heads, windows, prompts).
            queries: rows of each.
            keys: columns of each.
            dim: width of a head.
            positions: side of the token grid for relative positions, 0 without.
            out_site: site of the projection that follows.
        """
        kernel = f"{attn}/core"
        q, k, v, a = (self.site(f"{attn}/{name}") for name in ("q", "k", "v", "softmax"))
        scores = heads * queries * keys
        for axis in "hw" if positions else "":
            # Row i of the grid meets its own table: `positions` products of (positions, dim) x (dim, positions).
            table = Gemm(positions, dim, positions, repeat=heads * positions)
            self.product(
                f"{attn}/rel_pos_{axis}", kernel, "relative_position", table, q, self.float,
                source=Tensor(heads * queries * dim, q.bits, on_chip=True), out_on_chip=True,
                parameters=(2 * positions - 1) * dim,
            )  # fmt: skip
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
        per_score = SOFTMAX_OPS + (2 if positions else 0)  # two biases are added to each score
        self.plain(
            f"{attn}/softmax", kernel, "softmax", scores, per_score, transcendentals=scores, written=a
        )  # fmt: skip
        self.product(
            f"{attn}/av",
            kernel,
            "attention",
            Gemm(queries, keys, dim, repeat=heads),
            a,
            v,
            a_site=f"{attn}/softmax",
            source=Tensor(scores, a.bits, on_chip=True),
            out=self.site(out_site),
            dynamic_b=True,
            encodes=0 if a.is_float else scores,
            qparam_bits=self.site_qparam_bits(v, dim),
        )
