"""What the report shows of a quantized model's layers: activations against the codes that stand for them."""

import dataclasses
import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.sites import below, intercept_sites
from ahcptq_jax.calibration.images import prepare
from ahcptq_jax.quantizers import Uniform
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.runtime.quantized import Quantized
from sam_flax.layers import in_float32
from sam_flax.sam import Params, SamModel, apply_stage
from sam_flax.segmenter import call, parameters_at
from sam_flax.stages import Stage

# Fine enough that the part up to the breakpoint, a tenth of the range, still has a shape.
HISTOGRAM_BINS = 360


@dataclasses.dataclass(frozen=True, eq=False)
class HybridPanel:
    """Activations of a layer that HLUQ quantizes.

    Attributes:
      name: the layer's site.
      counts: (B,) activations per bin.
      edges: (B + 1,) borders of the bins.
      codes: (L,) the values that the codes stand for.
      breakpoint: where the logarithmic codes end and the uniform ones begin, `m + s_l`.
    """

    name: str
    counts: np.ndarray
    edges: np.ndarray
    codes: np.ndarray
    breakpoint: float


@dataclasses.dataclass(frozen=True, eq=False)
class GroupPanel:
    """Channels of a layer that CAG groups.

    Attributes:
      name: the layer's site.
      channel_min: (C,) least activation of every channel in calibration.
      channel_max: (C,) greatest.
      scale: (C,) every channel's own scale, before grouping.
      zero_point: (C,) every channel's own zero point.
      groups: (C,) int, the group of every channel.
      group_min: (G,) least value that the group's codes reach; the extremes of its channels if not given.
      group_max: (G,) greatest.
    """

    name: str
    channel_min: np.ndarray
    channel_max: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    groups: np.ndarray
    group_min: np.ndarray | None = None
    group_max: np.ndarray | None = None


@in_float32
def layer_panels(
    quantized: Quantized,
    model: SamModel,
    calib: list[tuple[np.ndarray, np.ndarray]],
    images: int = 4,
    per_kind: int = 2,
) -> list[HybridPanel | GroupPanel]:
    """Panels of encoder layers with HLUQ and with CAG, from the first to the last.

    Args:
        quantized: the model whose codes are shown.
        model: the floating-point model, whose activations are shown.
        calib: calibration images with boxes, as for `quantize`.
        images: how many of them to run.
        per_kind: panels of each kind.
    """
    chosen = _spread(quantized, "hybrid", per_kind) + _spread(quantized, "grouped", per_kind)
    if not chosen:
        return []
    samples = _activations(model, quantized, calib[:images], chosen)
    panels: list[HybridPanel | GroupPanel] = []
    for path in chosen:
        quantizer: Any = quantized.activations[path]
        x, kind = samples[path], kind_of(quantizer).name
        if kind == "hybrid":
            counts, edges = np.histogram(x, bins=HISTOGRAM_BINS)
            codes = np.asarray(quantizer.decode(jnp.arange(2**quantizer.bits)))
            border = float(np.asarray(quantizer.minimum) + np.asarray(quantizer.scale_log))
            panels.append(HybridPanel(path, counts, edges, np.unique(codes), border))
        elif kind == "grouped":
            low, high = x.min(0), x.max(0)
            own = Uniform.from_range(low, high, quantizer.bits)
            scale, zero = np.asarray(quantizer.scale), np.asarray(quantizer.zero_point)
            panels.append(
                GroupPanel(
                    path,
                    low,
                    high,
                    np.asarray(own.scale),
                    np.asarray(own.zero_point),
                    np.asarray(quantizer.groups),
                    group_min=-zero * scale,
                    group_max=(2**quantizer.bits - 1 - zero) * scale,
                )
            )
    return panels


def _spread(quantized: Quantized, kind: str, count: int) -> list[str]:
    """`count` encoder sites of a kind, evenly from first to last."""
    architecture = architecture_of(quantized.sam)
    encoder = set(architecture.parts) - set(architecture.decoder_parts)
    paths = sorted(
        (
            path
            for path, quantizer in quantized.activations.items()
            if kind_of(quantizer).name == kind and path.split("/")[0] in encoder
        ),
        # Block 10 comes after block 9, not after block 1.
        key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)],
    )
    if not paths:
        return []
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).round().astype(int))]


def _activations(
    model: SamModel, quantized: Quantized, calib: list[tuple[np.ndarray, np.ndarray]], paths: list[str]
) -> dict[str, np.ndarray]:
    """Values (rows, channels) seen at encoder sites."""
    wanted = {path: path for path in paths}
    collected: dict[str, list[np.ndarray]] = {path: [] for path in paths}

    def run(stage: Stage, inputs: tuple[Any, ...]) -> Any:
        params, here = parameters_at(model.params, stage.prefix), below(stage.prefix, wanted)
        if not here:
            return apply_stage(stage.module, params, inputs[0] if len(inputs) == 1 else inputs, "float32")
        x, seen = _observe(stage.module, params, inputs, tuple(here))
        for path, value in seen.items():
            collected[here[path]].append(np.asarray(value).reshape(-1, value.shape[-1]))
        return x

    rng = np.random.default_rng(0)
    for index, item in enumerate(calib):
        canvas = prepare(index, item, model.sam, quantized.quant_config, rng).canvas
        model.sam.stages().run(model.sam.embed(model.params, jnp.asarray(canvas[None])), run)
    return {path: np.concatenate(values) for path, values in collected.items()}


@partial(jax.jit, static_argnums=(0, 3))
@in_float32
def _observe(
    module: nn.Module, params: Params, inputs: tuple[Any, ...], paths: tuple[str, ...]
) -> tuple[Any, dict[str, jax.Array]]:
    """One stage's output, and the values at its sites `paths`."""
    seen: dict[str, jax.Array] = {}

    def collect(path: str, value: jax.Array) -> jax.Array:
        if path in paths:
            seen[path] = value
        return value

    with intercept_sites(collect):
        return call(module, params, *inputs), seen
