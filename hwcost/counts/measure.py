"""Measuring how often each code occurs in a quantized model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.base import Operation
from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.runtime.quantized import Quantized, with_decoded
from hwcost.counts.codes import Histogram
from sam_flax import preprocessing
from sam_flax.errors import InputError
from sam_flax.layers import in_float32
from sam_flax.stages import Stage

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


class _Counter:
    """Runs parts of a quantized model, and tallies the codes at their sites."""

    def __init__(self, quantized: Quantized) -> None:
        self.quantized, self.tally = quantized, _Tally()
        self.flat = flatten(quantized.params)
        # One function for all parts: stages of one kind are equal operations, and share a compilation.
        self._run = jax.jit(in_float32(self._part), static_argnums=0)

    def _part(self, operation: Operation, params: Any, weights: Any, activations: Any, inputs: tuple[Any, ...]) -> Any:
        with intercept_sites(partial(self._handle, activations)):
            return operation(with_decoded(params, weights), *inputs)

    def _handle(self, activations: dict[str, Quantizer], path: str, value: Any) -> Any:
        quantizer = activations.get(path)
        if quantizer is None:
            return value
        if kind_of(quantizer).cost.depends_on_codes:
            counts = jnp.bincount(quantizer.encode(value).reshape(-1), length=2**quantizer.bits)
            jax.debug.callback(lambda c: self.tally.add(path, np.asarray(c, np.int64)), counts)
        return quantizer.fake_quant(value)

    def stage(self, stage: Stage, inputs: tuple[Any, ...]) -> Any:
        """A stage of the encoder."""
        own = (below(stage.prefix, x) for x in (self.quantized.weights, self.quantized.activations))
        return self.run(stage.prefix, Operation(stage.module), unflatten(below(stage.prefix, self.flat)), *own, inputs)

    def run(self, prefix: str, operation: Operation, *args: Any) -> Any:
        """A part of the model whose sites have a prefix."""
        self.tally.prefix = prefix
        output = self._run(operation, *args)
        # The prefix must stay until the callbacks of this part are through.
        jax.effects_barrier()
        return output


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
    counter, sam, config = _Counter(quantized), quantized.sam, quantized.config
    architecture = architecture_of(sam)
    parts = tuple(f"{part}/" for part in architecture.decoder_parts)
    weights = {path: weight for path, weight in quantized.weights.items() if path.startswith(parts)}
    activations = {path: quantizer for path, quantizer in quantized.activations.items() if path.startswith(parts)}
    decode = Operation(sam, "decode", (("multimask_output", False),))
    for image, prompts in zip(images, boxes, strict=True):
        canvas, _ = preprocessing.prepare_image(image, config)
        embedded = architecture.embed(sam, quantized.params, jnp.asarray(canvas[None]))
        embedding = architecture.stages(sam).run(embedded, counter.stage)
        shown = np.resize(np.asarray(prompts, np.float64), (PROMPTS, 4))
        on_canvas = preprocessing.transform_of(config).apply_boxes(shown, image.shape[:2])
        params = architecture.decoder(quantized.params)
        counter.run("", decode, params, weights, activations, (embedding, None, on_canvas))
    found = sorted(counter.tally.counts.items())
    return {path: _histogram(quantized.activations[path], counts) for path, counts in found}


def _histogram(quantizer: Quantizer, counts: np.ndarray) -> Histogram:
    """The record of a site's counts, with what its quantizer must say for them to be read."""
    name = kind_of(quantizer).cost.code_field
    return Histogram(counts=tuple(counts.tolist()), **{name: int(np.asarray(getattr(quantizer, name)).reshape(()))})
