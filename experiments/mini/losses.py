"""Losses that train MINI: SAM's mask losses and two dense auxiliaries without which it ignores the image.

A decoder that has not learned to look gives the encoder almost no gradient, and a box alone already predicts a
blob. So the embedding is also trained directly (`dense_loss`), and the mask token must explain the object through
image features that no prompt has touched (`token_loss`).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.mini.augment import Batch
from experiments.mini.forward import Decoded, Prompts, auxiliary_head, decode, embedding_of, encode, upscale
from experiments.mini.teacher import Teacher, distance
from sam_flax.sam import Params, call
from sam_flax.segmenter import Segmenter

SMALL = 0.0025  # share of the canvas: 32 x 32 pixels of a photograph of 640 x 640


class LossWeights(NamedTuple):
    focal: float = 3.0
    dice: float = 1.0
    iou: float = 1.0
    dense: float = 0.4
    token: float = 0.6
    teacher: float = 1.0  # of the distance to the embeddings of a teacher, where there is one
    second: float = 0.5  # the round after the first click on an error, of half of the prompts; 0: it is left out
    # Of the single mask and of the best of three: a box means one object, a point may mean several.
    box: tuple[float, float] = (1.0, 0.3)
    point: tuple[float, float] = (0.4, 1.0)


def box_region(boxes: jax.Array, canvas: int, size: int) -> jax.Array:
    """Which cells of a size x size map lie in each box: (..., 4) -> (..., size, size) float 0/1."""
    centres = (jnp.arange(size) + 0.5) * (canvas / size)
    x0, y0, x1, y1 = (boxes[..., i, None] for i in range(4))
    # A margin of one cell lets the loss see the outside of the object's extreme points.
    margin = canvas / size
    in_x = (centres >= x0 - margin) & (centres <= x1 + margin)
    in_y = (centres >= y0 - margin) & (centres <= y1 + margin)
    return (in_y[..., :, None] & in_x[..., None, :]).astype(jnp.float32)


def balanced_bce(logits: jax.Array, target: jax.Array, region: jax.Array) -> jax.Array:
    """Binary cross-entropy inside `region`, object and background weighing the same: (..., H, W) -> (...)."""
    bce = sigmoid_bce(logits, target)
    inside, outside = region * target, region * (1 - target)
    axes = (-2, -1)
    mean_in = (bce * inside).sum(axes) / (inside.sum(axes) + 1.0)
    mean_out = (bce * outside).sum(axes) / (outside.sum(axes) + 1.0)
    return 0.5 * (mean_in + mean_out)


def sigmoid_bce(logits: jax.Array, target: jax.Array) -> jax.Array:
    return jax.nn.softplus(logits) - logits * target


def focal_loss(logits: jax.Array, target: jax.Array, area: jax.Array) -> jax.Array:
    """Focal loss (gamma 2) summed over the map and divided by the box area in cells: (..., H, W) -> (...)."""
    p = nn.sigmoid(logits)
    wrong = jnp.abs(target - p)
    return (wrong**2 * sigmoid_bce(logits, target)).sum((-2, -1)) / area


def dice_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """One less the overlap of masks; a small object left empty costs as much as a large one."""
    p = nn.sigmoid(logits)
    overlap, total = (p * target).sum((-2, -1)), (p + target).sum((-2, -1))
    return 1 - (2 * overlap + 0.1) / (total + 0.1)


def mask_iou(logits: jax.Array, target: jax.Array) -> jax.Array:
    """IoU of masks whose cells may be covered in part: (..., H, W) -> (...).

    A logit near zero is a cell that the outline crosses: interpolation will put the outline there.
    """
    p = nn.sigmoid(4 * logits)
    return jnp.minimum(p, target).sum((-2, -1)) / jnp.maximum(jnp.maximum(p, target).sum((-2, -1)), 1e-3)


def dense_loss(
    sam: Segmenter, params: Params, features: Any, upscaled: jax.Array, target: jax.Array, region: jax.Array
) -> jax.Array:
    """The object's mean embedding must find the object in its box: (B, P)."""
    b, p, size, _ = target.shape
    g = sam.config.grid
    coarse = target.reshape(b, p, g, size // g, g, size // g).mean((3, 5))
    coarse = coarse / (coarse.sum((-2, -1), keepdims=True) + 1e-3)
    mean = jnp.einsum("bpij,bijc->bpc", coarse, embedding_of(features).astype(jnp.float32))
    weights = call(auxiliary_head(sam.config.out_chans), params["auxiliary"], mean)
    logits = jnp.einsum("bpc,bijc->bpij", weights.astype(upscaled.dtype), upscaled).astype(jnp.float32)
    return balanced_bce(logits, target, region)


def pretrain_loss(
    sam: Segmenter, params: Params, batch: Batch, precision: jnp.dtype, teacher: Teacher | None = None
) -> tuple[jax.Array, dict]:
    """Encoder and upscaling alone, no prompts; with a teacher the encoder alone, by its embeddings."""
    features = encode(sam, params, batch.images, precision)
    if teacher is not None:
        loss = distance(sam, features, teacher, batch.images, precision)
        return loss, {"loss": loss, "teacher": loss}
    region = box_region(batch.true_boxes, sam.config.img_size, batch.masks.shape[-1])
    upscaled = upscale(sam, params, features)
    loss = _weighted(dense_loss(sam, params, features, upscaled, batch.masks, region), batch.weight)
    return loss, {"loss": loss, "dense": loss}


def joint_loss(
    sam: Segmenter,
    params: Params,
    batch: Batch,
    key: jax.Array,
    weights: LossWeights,
    precision: jnp.dtype,
    frozen_encoder: bool = False,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, dict]:
    """The full objective: every prompt, then half of them again with a click on the first answer's error.

    With `frozen_encoder` no gradient is computed for the image encoder.
    """
    features = encode(sam, params, batch.images, precision)
    if frozen_encoder:
        features = jax.lax.stop_gradient(features)
    prompts = first_prompts(batch)
    first = decode(sam, params, features, prompts)
    region = box_region(batch.true_boxes, sam.config.img_size, batch.masks.shape[-1])
    losses, iou = _mask_losses(first, batch.masks, region, batch.is_point, weights)

    upscaled = upscale(sam, params, features)
    hyper = first.hyper.astype(upscaled.dtype)
    token_logits = jnp.einsum("bpc,bijc->bpij", hyper, upscaled).astype(jnp.float32)
    token = _weighted(balanced_bce(token_logits, batch.masks, region), batch.weight)
    w = batch.weight
    small = w * ~batch.is_point * (batch.masks.mean((-2, -1)) < SMALL)
    metrics = {
        "token": token,
        "box_iou": _weighted(iou[..., 0], w * ~batch.is_point),
        "small_iou": _weighted(iou[..., 0], small),
        "point_iou": _weighted(iou[..., 1:].max(-1), w * batch.is_point),
    }
    total = _weighted(losses, w) + weights.token * token
    if weights.dense:
        metrics["dense"] = _weighted(dense_loss(sam, params, features, upscaled, batch.masks, region), w)
        total += weights.dense * metrics["dense"]
    if teacher is not None and weights.teacher:
        metrics["teacher"] = distance(sam, features, teacher, batch.images, precision)
        total += weights.teacher * metrics["teacher"]
    if weights.second:
        again, click_iou = _second_round(sam, params, features, batch, region, key, prompts, first, weights)
        total, metrics["click_iou"] = total + weights.second * again, click_iou
    return total, {"loss": total, **metrics}


def _second_round(
    sam: Segmenter,
    params: Params,
    features: Any,
    batch: Batch,
    region: jax.Array,
    key: jax.Array,
    prompts: Prompts,
    first: Decoded,
    weights: LossWeights,
) -> tuple[jax.Array, jax.Array]:
    """The loss and the IoU of the answers to a click on the errors of the first ones."""
    half = batch.weight.shape[1] // 2
    clicked = second_prompts(key, prompts, first, batch.masks, half, sam.config.img_size)
    again = decode(sam, params, features, clicked)
    # Two prompts mean one object, whether there is a box or not.
    none = jnp.zeros_like(batch.is_point[:, :half])
    losses, iou = _mask_losses(again, batch.masks[:, :half], region[:, :half], none, weights)
    return _weighted(losses, batch.weight[:, :half]), _weighted(iou[..., 0], batch.weight[:, :half])


def first_prompts(batch: Batch) -> Prompts:
    """Boxes, or points without a box."""
    b, p = batch.weight.shape
    size = batch.masks.shape[-1]
    return Prompts(
        batch.boxes,
        ~batch.is_point,
        batch.points[:, :, None],
        jnp.ones((b, p, 1), jnp.int32),
        jnp.zeros((b, p, size, size)),
        jnp.zeros((b, p), bool),
    )


def second_prompts(
    key: jax.Array, prompts: Prompts, answer: Decoded, target: jax.Array, half: int, canvas: int
) -> Prompts:
    """The first `half` prompts of each image with a click where the answer is wrong, mostly with its logits too."""
    click_key, mask_key = jax.random.split(key)
    logits = jax.lax.stop_gradient(answer.logits[:, :half])
    best = jnp.where(prompts.boxed[:, :half], 0, 1 + answer.iou[:, :half, 1:].argmax(-1))
    shown = jnp.take_along_axis(logits, best[..., None, None, None], axis=2)[:, :, 0]
    points, labels = error_clicks(click_key, shown, target[:, :half], canvas)
    b = points.shape[0]
    return Prompts(
        prompts.boxes[:, :half],
        prompts.boxed[:, :half],
        jnp.concatenate([prompts.points[:, :half], points[:, :, None]], axis=2),
        jnp.concatenate([prompts.labels[:, :half], labels[..., None]], axis=2),
        shown,
        jax.random.uniform(mask_key, (b, half)) < 0.8,
    )


def error_clicks(key: jax.Array, logits: jax.Array, target: jax.Array, canvas: int) -> tuple[jax.Array, jax.Array]:
    """A click well inside the wrong part of each mask (B, P, m, m): xy (B, P, 2), and 1 for object or 0."""
    b, p, m, _ = target.shape
    truth = target > 0.5
    wrong = ((logits > 0) != truth).astype(jnp.float32).reshape(b * p, m, m)
    window = max(3, m // 20) | 1
    deep = jax.lax.reduce_window(wrong, 0.0, jax.lax.add, (1, window, window), (1, 1, 1), "SAME") / window**2
    score = jnp.log(wrong * deep**2 + 1e-9) + jax.random.gumbel(key, wrong.shape)
    cell = score.reshape(b * p, -1).argmax(-1)
    is_object = jnp.take_along_axis(truth.reshape(b * p, -1), cell[:, None], axis=1)[:, 0]
    xy = (jnp.stack([cell % m, cell // m], axis=-1) + 0.5) * (canvas / m)
    return xy.reshape(b, p, 2), is_object.reshape(b, p).astype(jnp.int32)


def _mask_losses(
    decoded: Decoded, target: jax.Array, region: jax.Array, is_point: jax.Array, weights: LossWeights
) -> tuple[jax.Array, jax.Array]:
    """Losses (B, P) of all masks, and their IoU (B, P, 4)."""
    each = target[:, :, None]
    # A floor, or the empty canvas around a small object would be most of the loss.
    area = region.sum((-2, -1))[..., None] + 32.0
    logits = decoded.logits
    per_mask = weights.focal * focal_loss(logits, each, area) + weights.dice * dice_loss(logits, each)
    iou = jax.lax.stop_gradient(mask_iou(logits, each))
    single, three = per_mask[..., 0], per_mask[..., 1:]
    # A little of the mean keeps every mask alive.
    multi = 0.95 * three.min(-1) + 0.05 * three.mean(-1)
    of_single, of_multi = (jnp.where(is_point, p, b) for p, b in zip(weights.point, weights.box, strict=True))
    return of_single * single + of_multi * multi + weights.iou * jnp.square(decoded.iou - iou).mean(-1), iou


def _weighted(values: jax.Array, weight: jax.Array) -> jax.Array:
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)
