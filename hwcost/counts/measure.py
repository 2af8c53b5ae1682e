"""Measuring how often each code occurs in a quantized model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures.sites import below, intercept_sites
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.runtime.quantized import Quantized, with_decoded
from hwcost.counts.codes import Histogram
from sam_flax import preprocessing
from sam_flax.encoders.vit import PatchEmbed
from sam_flax.errors import InputError
from sam_flax.layers import in_float32
from sam_flax.sam import Sam, apply_embed, call, encoder_stages

# Boxes shown for each image, as in calibration: one shape for all images, one compilation.
PROMPTS = 8


class _Tally:
    """Host-side sums; attention visits a site once for each chunk, so that no return value could carry them.

    Attributes:
        prefix: path of the stage that runs, before the paths of its sites.
        counts: site path -> occurrences of each code so far.
    """

    def __init__(self) -> None:
        self.prefix = ""
        self.counts: dict[str, np.ndarray] = {}

    def add(self, path: str, counts: np.ndarray) -> None:
        path = self.prefix + path
        self.counts[path] = self.counts.get(path, np.zeros(len(counts), np.int64)) + counts


def measure_histograms(
    quantized: Quantized, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray]
) -> dict[str, Histogram]:
    """Counts the codes of every site whose arithmetic depends on them, while the model segments images.

    Matrix products are in full float32, as in everything else that runs a quantized model: the codes that are counted
    are those that it computes.

    Args:
        quantized: the model.
        images: (H, W, 3) uint8.
        boxes: for each image (N, 4) prompts as x0, y0, x1, y1 in its pixels; eight are shown, repeated if fewer.

    Returns:
        Site path -> histogram, summed over the images.

    Raises:
        InputError: if there are no images, or not as many sets of boxes.
    """
    if not len(images) or len(images) != len(boxes):
        raise InputError(f"There are {len(images)} images and {len(boxes)} sets of boxes; give one set for each image.")
    tally, config = _Tally(), quantized.config

    def handle(activations: dict[str, Quantizer], path: str, value: Any) -> Any:
        quantizer = activations.get(path)
        if quantizer is None:
            return value
        if kind_of(quantizer).cost.depends_on_codes:
            counts = jnp.bincount(quantizer.encode(value).reshape(-1), length=2**quantizer.bits)
            jax.debug.callback(lambda c: tally.add(path, np.asarray(c, np.int64)), counts)
        return quantizer.fake_quant(value)

    @in_float32
    def run(module: Any, params: Any, weights: Any, activations: Any, *args: Any, **kwargs: Any) -> Any:
        with intercept_sites(lambda path, value: handle(activations, path, value)):
            return call(module, with_decoded(params, weights), *args, **kwargs)

    @jax.jit
    def decode(params: Any, weights: Any, activations: Any, embedding: jax.Array, prompts: jax.Array) -> Any:
        sam = Sam(config)
        return run(sam, params, weights, activations, embedding, boxes=prompts, multimask_output=False, method="decode")

    stage = jax.jit(run, static_argnums=0)
    encoder = quantized.params["image_encoder"]
    embed = PatchEmbed(config.patch_size, config.embed_dim, parent=None)
    for image, prompts in zip(images, boxes, strict=True):
        canvas, _ = preprocessing.prepare_image(image, config)
        x = apply_embed(embed, {k: encoder[k] for k in ("patch_embed", "pos_embed")}, canvas[None])
        for key, module in encoder_stages(config):
            tally.prefix = f"image_encoder/{key}/"
            quantizers = below(tally.prefix, quantized.activations)
            x = stage(module, encoder.get(key, {}), below(tally.prefix, quantized.weights), quantizers, x)
            # The prefix must stay until the callbacks of this stage are through.
            jax.effects_barrier()
        tally.prefix = ""
        params = {k: quantized.params[k] for k in ("prompt_encoder", "mask_decoder")}
        weights = {k: v for k, v in quantized.weights.items() if k.startswith("mask_decoder/")}
        quantizers = {k: v for k, v in quantized.activations.items() if k.startswith("mask_decoder/")}
        on_canvas = preprocessing.apply_boxes(
            np.resize(np.asarray(prompts, np.float64), (PROMPTS, 4)), image.shape[:2], config.img_size
        )
        decode(params, weights, quantizers, x, on_canvas)
        jax.effects_barrier()
    return {path: _histogram(quantized.activations[path], counts) for path, counts in sorted(tally.counts.items())}


def _histogram(quantizer: Quantizer, counts: np.ndarray) -> Histogram:
    """The record of a site's counts, with what its quantizer must say for them to be read."""
    name = kind_of(quantizer).cost.code_field
    return Histogram(counts=tuple(counts.tolist()), **{name: int(np.asarray(getattr(quantizer, name)).reshape(()))})
