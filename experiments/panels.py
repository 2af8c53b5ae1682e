"""What the report shows of a quantized model's layers: activations against the codes that stand for them."""

import jax.numpy as jnp
import numpy as np

from ahcptq_jax.quantize import prepare
from ahcptq_jax.quantized import Quantized
from ahcptq_jax.quantizers import Grouped, Hybrid, Uniform
from ahcptq_jax.sites import intercept_sites
from experiments.report import GroupPanel, HybridPanel
from sam_flax.sam import SamModel

HISTOGRAM_BINS = 120


def layer_panels(
    quantized: Quantized,
    model: SamModel,
    calib: list[tuple[np.ndarray, np.ndarray]],
    images: int = 4,
    per_kind: int = 2,
) -> list[HybridPanel | GroupPanel]:
    """Panels of the first and the last encoder layer with HLUQ and with CAG.

    Activations are the floating-point model's on the first calibration images.
    """
    chosen = _spread(quantized, Hybrid, per_kind) + _spread(quantized, Grouped, per_kind)
    if not chosen:
        return []
    samples = _activations(model, quantized, calib[:images], chosen)
    panels: list[HybridPanel | GroupPanel] = []
    for path in chosen:
        quantizer, x = quantized.activations[path], samples[path]
        codes = jnp.arange(2**quantizer.bits)
        if isinstance(quantizer, Hybrid):
            counts, edges = np.histogram(x, bins=HISTOGRAM_BINS)
            border = float(np.asarray(quantizer.minimum) + np.asarray(quantizer.scale_log))
            panels.append(HybridPanel(path, counts, edges, np.unique(quantizer.decode(codes)), border))
        elif isinstance(quantizer, Grouped):
            rows = x.reshape(-1, x.shape[-1])
            low, high = rows.min(0), rows.max(0)
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


def _spread(quantized: Quantized, kind: type, count: int) -> list[str]:
    """`count` encoder sites of a kind, evenly from first to last."""
    paths = sorted(
        path
        for path, quantizer in quantized.activations.items()
        if isinstance(quantizer, kind) and path.startswith("image_encoder/") and path.endswith("/input")
    )
    picks = np.unique(np.linspace(0, len(paths) - 1, count).round().astype(int)) if paths else []
    return [paths[i] for i in picks]


def _activations(
    model: SamModel, quantized: Quantized, calib: list[tuple[np.ndarray, np.ndarray]], paths: list[str]
) -> dict[str, np.ndarray]:
    """Values (rows, channels) seen at encoder sites."""
    collected: dict[str, list[np.ndarray]] = {path: [] for path in paths}

    def collect(path: str, value):
        if path in collected:
            collected[path].append(np.asarray(value).reshape(-1, value.shape[-1]))
        return value

    rng = np.random.default_rng(0)
    for index, item in enumerate(calib):
        canvas = prepare(index, item, model.sam, quantized.quant_config, rng).canvas
        with intercept_sites(collect):
            model.sam.apply({"params": model.params}, jnp.asarray(canvas[None]), method="encode_image")
    return {path: np.concatenate(values) for path, values in collected.items()}
