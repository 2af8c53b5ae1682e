"""What is set side by side: the method in its two forms, its baselines, and the method without its parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ahcptq_jax.config import QuantConfig
from hwcost.board.accelerator import Design, Element
from hwcost.counts.codes import AssumedCodes, Histogram, histograms
from hwcost.counts.counts import Counts, count
from hwcost.counts.formats import Formats, architecture_name
from sam_flax.config import SamConfig

METHOD = "method"
TWO_PATH = "two_path"  # the paper's own form, where the method is on the grid
BASELINES = ("fp32", "fp16", "int8", "uniform")
GROUPS = (1, 2, 4, 8, 16)
SHOWN_GRIDS = (8, 7, 6)  # widths of levels that are shown, the default first
_UNIFORM: dict[str, Any] = {"hluq": False, "cag": False, "agq": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Something to build: a model at a precision and the design for it."""

    name: str
    label: str
    counts: Counts
    design: Design


def forms(table: Mapping[str, Variant]) -> tuple[str, ...]:
    """The names of the method's forms that are set side by side: the one asked for, then the other if there is one."""
    return tuple(name for name in (METHOD, TWO_PATH, f"grid_{SHOWN_GRIDS[0]}") if name in table)[:2]


def baselines(table: Mapping[str, Variant]) -> tuple[str, ...]:
    """What the method is compared with: on the grid the paper's own form as well."""
    return (*BASELINES, *((TWO_PATH,) if TWO_PATH in table else ()))


def variants(
    sam_config: SamConfig,
    quant_config: QuantConfig,
    codes: Mapping[str, Any] | None = None,
    *,
    prompts: int = 1,
    grid_bits: int | None = None,
    assumed: AssumedCodes | None = None,
) -> dict[str, Variant]:
    """The method, its baselines and its ablations, by name.

    What the quantized designs leave in floating point is FP16.

    Args:
        sam_config: the model.
        quant_config: the quantization of the method.
        codes: measured histograms in any form of `hwcost.counts.codes.histograms`. The method uses all of them; a
            variant uses those whose site has the same kind of codes there, at the same width.
        prompts: boxes decoded for the image.
        grid_bits: width of the levels of `METHOD`; 0 makes it the paper's own form; None takes what the quantization
            has. The other form is beside it.
        assumed: what sites without a histogram take.

    Raises:
        InputError: if a histogram fits no site of the method, or the codes do not fit in the levels.
    """
    grid_bits = quant_config.grid_bits if grid_bits is None else grid_bits
    maker = _Maker(sam_config, quant_config, histograms(codes or {}), prompts, assumed)
    maker.add_baselines()
    has_levels = quant_config.hluq or quant_config.cag or quant_config.agq
    if grid_bits and has_levels:
        maker.add_grid(METHOD, grid_bits)
        maker.add_paper_form(TWO_PATH)
    else:
        maker.add_paper_form(METHOD)
    for bits in SHOWN_GRIDS if has_levels else ():
        if maker.widest_activations() <= bits != grid_bits:
            maker.add_grid(f"grid_{bits}", bits)
    maker.add("passes", f"{maker.tag}, HLUQ and AGQ in passes on plain elements", quant_config, element="mac")
    maker.add_ablations()
    return maker.table


class _Maker:
    """Makes the variants of one model at one quantization, and collects them in `table`."""

    def __init__(
        self,
        sam_config: SamConfig,
        quant_config: QuantConfig,
        measured: Mapping[str, Histogram],
        prompts: int,
        assumed: AssumedCodes | None,
    ) -> None:
        self.sam_config, self.quant_config, self.measured = sam_config, quant_config, measured
        self.prompts, self.assumed = prompts, assumed
        self.tag = f"W{quant_config.w_bits}A{quant_config.a_bits}"
        # The HLUQ element serves AGQ's shifts as well; without either, plain elements do.
        self.element: Element = "two_path" if quant_config.hluq or quant_config.agq else "mac"
        self.table: dict[str, Variant] = {}

    def add(
        self,
        name: str,
        label: str,
        config: QuantConfig | None,
        *,
        float_bits: int = 16,
        grid_bits: int = 0,
        **design: Any,
    ) -> None:
        """Adds a variant; `design` are fields of `Design`."""
        fitting = self.measured if config == self.quant_config else self._fitting(config)
        counts = count(
            self.sam_config, config, fitting,
            prompts=self.prompts, float_bits=float_bits, grid_bits=grid_bits, assumed=self.assumed,
        )  # fmt: skip
        # One array serves all layers: the widest codes and the largest table decide.
        address = max(layer.a.table_address for layer in counts.layers if layer.a)
        bits = max(
            (x.bits for layer in counts.layers for x in (layer.a, layer.b) if x and not x.is_float), default=float_bits
        )
        made = Design(float_bits=float_bits, table_address=address, **{"bits": bits, **design})
        self.table[name] = Variant(name=name, label=label, counts=counts, design=made)

    def changed(self, **switches: Any) -> QuantConfig:
        """The quantization with some of its switches set."""
        return dataclasses.replace(self.quant_config, **switches)

    def widest_activations(self) -> int:
        """The most bits of a quantized activation."""
        layers = self.table["uniform"].counts.layers
        return max((layer.a.bits for layer in layers if layer.a and not layer.a.is_float), default=0)

    def add_baselines(self) -> None:
        """Floating point, and uniform codes without the method."""
        self.add("fp32", "FP32", None, float_bits=32, element="float", bits=32)
        self.add("fp16", "FP16", None, element="float", bits=16)
        self.add("int8", "INT8 uniform", QuantConfig(w_bits=8, a_bits=8, **_UNIFORM), element="mac", bits=8)
        self.add("uniform", f"{self.tag} uniform", self.changed(**_UNIFORM), element="mac")

    def add_grid(self, name: str, level_bits: int) -> None:
        """The method with every code a level on the grid."""
        self.add(
            name,
            f"{self.tag} on a grid of {level_bits}-bit levels",
            self.quant_config,
            grid_bits=level_bits,
            element="levels",
            level_bits=level_bits,
        )

    def add_paper_form(self, name: str) -> None:
        """The method in its own form, with a sum for the exponents, for the rest and for each group."""
        elements = "two-path elements" if self.element == "two_path" else "plain elements"
        self.add(name, f"{self.tag} in the paper's form, {elements}", self.quant_config, element=self.element)

    def add_ablations(self) -> None:
        """The paper's form without HLUQ, AGQ or CAG, and with other numbers of groups."""
        quant, tag, element = self.quant_config, self.tag, self.element
        if quant.hluq:
            self.add("no_hluq", f"{tag} without HLUQ, AGQ in passes", self.changed(hluq=False), element="mac")
        if quant.agq:
            left: Element = "two_path" if quant.hluq else "mac"
            self.add("no_agq", f"{tag} without AGQ", self.changed(agq=False), element=left)
        if not quant.cag:
            return
        self.add("no_cag", f"{tag} without CAG", self.changed(cag=False), element=element)
        for groups in GROUPS:
            config, many = self.changed(groups=groups), f"{tag}, {groups} group{'s' if groups > 1 else ''}"
            self.add(f"groups_{groups}", many, config, element=element)
            if groups > 1:
                label = f"{many} told apart in the column"
                self.add(f"column_{groups}", label, config, element=element, column_groups=groups)

    def _fitting(self, config: QuantConfig | None) -> dict[str, Histogram]:
        """The histograms of sites whose codes have a histogram's kind and width at a quantization."""
        formats = Formats(config, architecture_name(self.sam_config), 16)

        def fits(path: str, histogram: Histogram) -> bool:
            site = formats.site(path)
            return site.cost is not None and site.cost.depends_on_codes and len(histogram.counts) == 2**site.bits

        return {path: histogram for path, histogram in self.measured.items() if fits(path, histogram)}
