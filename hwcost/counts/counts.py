"""Exact counts of what one image with its prompts costs: operations, bytes and reuse, layer by layer.

The graph is the one of `sam_flax`, padding of attention windows included; nothing is run. A layer belongs to a
kernel: layers of one kernel stream into each other on the chip, and only tensors that are not `on_chip` cross the
DRAM interface.

Integer arithmetic of a quantized product, per pair of an activation and a weight code:

    uniform, grouped   A += w*a                                       one multiply-accumulate
    log2 (AGQ)         A[k mod tau] += v << (K - k div tau)           one shift and one add; nothing for zero
    hybrid (HLUQ)      log code: L += w << (K - k)                    one shift and one add; nothing for zero
                       uniform code: L += w << K and U += w*u         one multiply-accumulate and a dual-path add

and per output one rescale for each accumulator (CAG has one per group), besides the corrections for zero points.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

from ahcptq_jax.config import QuantConfig
from hwcost.counts import graph
from hwcost.counts.builder import Builder
from hwcost.counts.codes import AssumedCodes, histograms, mini_codes
from hwcost.counts.costs import Layer, Ops
from sam_flax.config import SamConfig

# What the counts leave out, and why it may matter.
UNMODELLED: tuple[str, ...] = (
    "resizing, normalising and padding of the image (host)",
    "resizing the low-resolution masks to the image, thresholding and run-length encoding (host)",
    "mask prompts: the counted prompts are boxes (mask_downscaling idle, its weights not loaded)",
    "window partition, head splitting and transposes: address generation, no arithmetic",
    "reading a window of the residual stream out of order: DRAM pages beyond the stated efficiency",
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
    layers: tuple[Layer, ...]
    measured_sites: int
    assumed_sites: int
    assumed: AssumedCodes
    unmodelled: tuple[str, ...] = UNMODELLED

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
    assumed: AssumedCodes | None = None,
) -> Counts:
    """Counts one image with `prompts` box prompts.

    Args:
        sam_config: the model.
        quant_config: the quantization; None is the floating-point model.
        codes: measured code histograms, {site path: counts or `Histogram`} (see `hwcost.codes`).
        prompts: boxes decoded for the image.
        float_bits: width of what stays in floating point, 16 or 32.
        assumed: what sites without a histogram take; by default the pooled codes of MINI at W4A4
            (`hwcost.codes.mini_codes`).

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
    assumed = assumed or mini_codes()
    builder = Builder(quant_config, measured, assumed, float_bits)
    graph.encoder(builder, sam_config)
    graph.decoder(builder, sam_config, prompts)
    unknown = sorted(set(measured) - builder.histogram_sites)
    if unknown:
        raise ValueError(
            f"The histogram of {unknown[0]} belongs to no hybrid or log2 site of this model and quantization; give "
            "the histograms measured on it."
        )
    return Counts(
        sam_config=sam_config,
        quant_config=quant_config,
        prompts=prompts,
        float_bits=float_bits,
        layers=tuple(builder.layers),
        measured_sites=len(measured),
        assumed_sites=len(builder.histogram_sites - set(measured)),
        assumed=assumed,
    )
