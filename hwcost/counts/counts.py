"""Exact counts of what one image with its prompts costs: operations, bytes and reuse, layer by layer.

The graph is the one of `sam_flax`, padding of attention windows included; nothing is run. A layer belongs to a
kernel: layers of one kernel stream into each other on the chip, and only tensors that are not `on_chip` cross the
DRAM interface.

What an element does with a pair of codes is in `hwcost.counts.arithmetic`; per output there is one rescale for each
accumulator (CAG has one per group), besides the corrections for zero points. On the grid a code stands for a whole
level, every product is one multiply-accumulate of a level and a code, and every output has one sum and one rescale.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

from ahcptq_jax.config import QuantConfig
from hwcost.counts.builder import Builder
from hwcost.counts.codes import AssumedCodes, histograms, mini_codes
from hwcost.counts.costs import Layer, Ops
from hwcost.counts.formats import Formats, architecture_name, check_grid_bits
from hwcost.counts.graphs import graph_named
from sam_flax.config import SamConfig
from sam_flax.errors import InputError

# What the counts of every model leave out, and why it may matter: before the image and after the masks, and around the
# layers. A graph says the rest.
HOST: tuple[str, ...] = (
    "resizing, normalising and padding of the image (host)",
    "resizing the low-resolution masks to the image, thresholding and run-length encoding (host)",
)
AROUND: tuple[str, ...] = (
    "bandwidth and bank conflicts of the on-chip buffers",
    "instruction fetch, scheduling, host-accelerator synchronisation and DRAM refresh",
    "routing, control and clock-tree area beyond the utilisation limit",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """All layers, in forward order, with what was assumed.

    Attributes:
        sam_config: the model.
        quant_config: the quantization; None in floating point.
        prompts: box prompts of the image.
        float_bits: width of what is in floating point.
        grid_bits: width of the levels on the grid; 0 is the paper's own form.
        layers: the layers.
        measured_sites: hybrid and log2 sites with a measured histogram.
        assumed_sites: those without.
        assumed: the shares that these took.
        unmodelled: what is not in the counts.
    """

    sam_config: SamConfig
    quant_config: QuantConfig | None
    prompts: int
    float_bits: int
    grid_bits: int
    layers: tuple[Layer, ...]
    measured_sites: int
    assumed_sites: int
    assumed: AssumedCodes
    unmodelled: tuple[str, ...]

    @functools.cached_property
    def kernels(self) -> tuple[tuple[str, str, tuple[Layer, ...]], ...]:
        """(name, part, layers) of each kernel in forward order.

        The layers have lost their names, so that kernels of one kind are one object and are worked out once.
        """
        kinds: dict[tuple[Layer, ...], tuple[Layer, ...]] = {}
        result = []
        for (name, part), group in itertools.groupby(self.layers, lambda layer: (layer.kernel, layer.part)):
            layers = tuple(dataclasses.replace(layer, path="", kernel="", part="") for layer in group)
            result.append((name, part, kinds.setdefault(layers, layers)))
        return tuple(result)

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
    grid_bits: int | None = None,
    assumed: AssumedCodes | None = None,
) -> Counts:
    """Counts one image with `prompts` box prompts.

    Args:
        sam_config: the model.
        quant_config: the quantization; None is the floating-point model.
        codes: measured code histograms, {site path: counts or `Histogram`} (see `hwcost.counts.codes`).
        prompts: boxes decoded for the image.
        float_bits: width of what stays in floating point, 16 or 32.
        grid_bits: 5 to 8: every code stands for a whole level of so many bits, and every product has one sum. 0: the
            paper's own form, with a sum for each group, for the exponents and for the rest. None: as quantized.
        assumed: what sites without a histogram take; by default `hwcost.counts.codes.mini_codes`.

    Returns:
        The layers. Rounded where shares multiply counts, exact otherwise.

    Raises:
        InputError: if an argument is out of range or a histogram's site is unknown or has other bits.
    """
    if prompts < 1:
        raise InputError(f"prompts={prompts} must be at least 1.")
    if float_bits not in (16, 32):
        raise InputError(f"float_bits={float_bits} must be 16 or 32.")
    if grid_bits is None:
        grid_bits = 0 if quant_config is None else quant_config.grid_bits
    check_grid_bits(grid_bits)
    architecture = architecture_name(sam_config)
    measured = histograms(codes or {})
    assumed = assumed or mini_codes()
    builder = Builder(Formats(quant_config, architecture, float_bits, grid_bits), measured, assumed)
    graph = graph_named(architecture)
    graph.add_layers(builder, sam_config, prompts)
    unknown = sorted(set(measured) - builder.histogram_sites)
    if unknown:
        raise InputError(
            f"The histogram of {unknown[0]} belongs to no hybrid or log2 site of this model and quantization; give "
            "the histograms measured on it."
        )
    return Counts(
        sam_config=sam_config,
        quant_config=quant_config,
        prompts=prompts,
        float_bits=float_bits,
        grid_bits=grid_bits,
        layers=tuple(builder.layers),
        measured_sites=len(measured),
        assumed_sites=len(builder.histogram_sites - set(measured)),
        assumed=assumed,
        unmodelled=(*HOST, *graph.unmodelled, *AROUND),
    )
