"""The curve: mean IoU at mask resolution of held-back photographs and held-out scenes while training goes on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.mini.atlas import Atlas
from experiments.mini.augment import Batch, BatchSettings, make_batch, plain
from experiments.mini.forward import decode, encode
from experiments.mini.losses import SMALL, first_prompts, mask_iou
from sam_flax.sam import Params
from sam_flax.segmenter import Segmenter


def make_curve(sam: Segmenter, settings: BatchSettings, precision: jnp.dtype) -> Callable[..., dict[str, float]]:
    """Scores of parameters on `count` batches: (params, atlas, {name: cumulative weights}, count) -> scores.

    Of each name `box`, the same of small objects and on blank images, and `point`, the best of three.
    """
    shown = plain(settings)

    @jax.jit
    def score(params: Params, key: jax.Array, atlas: Atlas, cumulative: jax.Array) -> dict[str, jax.Array]:
        batch = make_batch(key, atlas, cumulative, shown)
        blank = batch._replace(images=jnp.full_like(batch.images, 124.0))
        features = encode(sam, params, batch.images, precision)
        box = _iou(sam, params, features, batch)[..., 0]
        point = _iou(sam, params, features, batch._replace(is_point=jnp.ones_like(batch.is_point)))[..., 1:].max(-1)
        without = _iou(sam, params, encode(sam, params, blank.images, precision), batch)[..., 0]
        small = batch.weight * (batch.masks.mean((-2, -1)) < SMALL)
        weights = {"box": batch.weight, "small": small, "blank": batch.weight, "point": batch.weight}
        values = {"box": box, "small": box, "blank": without, "point": point}
        return {k: jnp.stack([(values[k] * w).sum(), w.sum()]) for k, w in weights.items()}

    def evaluate(params: Params, atlas: Atlas, parts: dict[str, Any], count: int) -> dict[str, float]:
        found = {}
        for part, cumulative in parts.items():
            sums = [score(params, jax.random.key(i), atlas, cumulative) for i in range(count)]
            for name in sums[0]:
                total, weight = sum(s[name] for s in sums)
                found[f"{part}_{name}"] = round(float(total / jnp.maximum(weight, 1.0)), 4)
        return found

    return evaluate


def _iou(sam: Segmenter, params: Params, features: Any, batch: Batch) -> jax.Array:
    decoded = decode(sam, params, features, first_prompts(batch))
    return mask_iou(decoded.logits, batch.masks[:, :, None])
