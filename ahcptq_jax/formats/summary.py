"""The summary of a quantized model: the quantizers of every layer, and the size of each part of the artefact."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections import defaultdict

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.formats import artefact
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.recipe import recipe_of, weight_path
from ahcptq_jax.runtime.quantized import FILE_FUNCTIONS, Quantized

COLUMNS = 100  # of a terminal that the table fits


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, one attention site, or one part left in floating point.

    Attributes:
        name: path of the layer, of the site, or of the part.
        shape: the kernel's; empty where there is none.
        w_bits: width of its weights' codes; None where there are none, 16 or 32 (of the widest) in floating point.
        a_bits: width of its input's codes, or the site's; None in floating point.
        kind: the activation quantizer's, "" for none.
        groups: distinct scales of the activation quantizer, 0 for none.
        detail: numbers of the quantizer that say how it divides its range: HLUQ's `log` of `all` codes, breakpoint
            above the minimum, and step; AGQ's tau.
        nbytes: bytes in the artefact: codes, scales, zero points, labels.
    """

    name: str
    shape: tuple[int, ...]
    w_bits: int | None
    a_bits: int | None
    kind: str
    groups: int
    detail: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rows in the order of the model's paths, and the total; `str()` makes a table of 100 columns of them.

    Attributes:
        rows: quantized layers and sites, then what stays in floating point, then the file's header.
        float32_nbytes: size of the model's parameters before quantization.
        unnamed: sites of which no rule of the recipe says anything; they stay in floating point, perhaps by oversight.
    """

    rows: tuple[Row, ...]
    float32_nbytes: int
    unnamed: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the artefact in bytes."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "shape", "W", "A", "quantizer", "groups", "bytes")
        places = [_place(row.name) for row in self.rows]
        body = [
            (
                f"  {leaf}" if parent else leaf,
                "x".join(map(str, row.shape)),
                str(row.w_bits or "-"),
                str(row.a_bits or "-"),
                f"{row.kind}, {row.detail}" if _short(row.detail) else row.kind or "-",
                str(row.groups or "-"),
                f"{row.nbytes:,}",
            )
            for row, (parent, leaf) in zip(self.rows, places, strict=True)
        ]
        total = ("total", "", "", "", "", "", f"{self.nbytes:,}")
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        right = {"W", "A", "groups", "bytes"}

        def line(cells: tuple[str, ...]) -> str:
            padded = (
                cell.rjust(width) if name in right else cell.ljust(width)
                for cell, width, name in zip(cells, widths, head, strict=True)
            )
            return "  ".join(padded).rstrip()

        rule = "-" * len(line(head))
        table, section = [line(head), rule], ""
        for row, (parent, _), cells in zip(self.rows, places, body, strict=True):
            if parent != section:
                section = parent
                table += [parent] if parent else []
            table.append(line(cells))
            if row.detail and not _short(row.detail):
                table += textwrap.wrap(row.detail, COLUMNS, initial_indent="    ", subsequent_indent="    ")
        share = f"{self.nbytes / self.float32_nbytes:.3f} of float32, which is {self.float32_nbytes:,} bytes"
        table += [rule, line(total), share]
        if self.unnamed:
            sites = f"No rule names these sites, which stay in floating point: {', '.join(self.unnamed)}."
            table += textwrap.wrap(sites, COLUMNS, break_long_words=False)
        return "\n".join(table)


def _short(detail: str) -> bool:
    """Whether a detail stands beside the name of its kind; others get a line of their own."""
    return 0 < len(detail) <= 5


def _place(name: str) -> tuple[str, str]:
    """The part of the model that a row is printed under, and what is left of its name.

    A part is what ends in a number, such as a block; elsewhere it is the first one or two steps of the path.
    """
    steps = name.split("/")
    numbered = [i for i, step in enumerate(steps[:-1]) if re.search(r"_\d+$", step)]
    depth = numbered[0] + 1 if numbered else min(2, len(steps) - 1)
    return "/".join(steps[:depth]), "/".join(steps[depth:])


def summarize(quantized: Quantized) -> Summary:
    """The summary of a model as `save` writes it; the total is the file's size.

    Raises:
        ValueError: as `save` does, if the model is not sound.
    """
    tensors = artefact.tensors_of(quantized)
    rows = []
    paths = {weight_path(site) or site for site in quantized.activations} | set(quantized.weights)
    for path in sorted(paths, key=_by_number):
        weight = quantized.weights.get(path)
        site = path if path in quantized.activations else f"{path}/input"
        quantizer = quantized.activations.get(site)
        kind = kind_of(quantizer) if quantizer else None
        names = [f"weights/{path}/{part}" for part in ("codes", "scale", "zero_point")]
        names += [
            f"activations/{site}",
            *(f"activations/{site}/{name}" for name in (kind.channel_fields if kind else ())),
        ]
        rows.append(
            Row(
                name=path,
                shape=weight.shape if weight else (),
                w_bits=weight.bits if weight else None,
                a_bits=quantizer.bits if quantizer else None,
                kind=kind.name if kind else "",
                groups=kind.groups(quantizer) if kind else 0,
                detail=kind.describe(quantizer) if kind else "",
                nbytes=sum(tensors[name].nbytes for name in names if name in tensors),
            )
        )
    parts: dict[str, int] = defaultdict(int)
    widest: dict[str, int] = defaultdict(int)  # bits
    for name, tensor in tensors.items():
        if name.startswith("params/"):
            part = "/".join(name.split("/")[1:3])
            parts[part] += tensor.nbytes
            widest[part] = max(widest[part], 8 * tensor.itemsize)
    rows += [Row(f"{part} (float)", (), widest[part], None, "", 0, "", size) for part, size in sorted(parts.items())]
    header = len(artefact.header_bytes(quantized, tensors, checksums=False))
    rows.append(Row("header (names, recipe, checksums)", (), None, None, "", 0, "", header))
    architecture, sam = architecture_of(quantized.sam), quantized.sam
    original = sum(math.prod(shape) for shape in architecture.shapes(sam).values())
    unnamed = recipe_of(architecture, quantized.quant_config).unnamed(architecture.sites(sam))
    return Summary(tuple(rows), 4 * original, tuple(unnamed))


def _by_number(path: str) -> list[tuple[int, str]]:
    """A key that sorts blocks_10 after blocks_9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path)]


FILE_FUNCTIONS["summarize"] = summarize
