"""Losses that train MINI: SAM's mask losses and two dense auxiliaries without which it ignores the image.

A decoder that has not learned to look gives the encoder almost no gradient, and a box alone already predicts a
blob. So the embedding is also trained directly (`dense_loss`), and the mask token must explain the object through
image features that no prompt has touched (`token_loss`).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_flax.heads.mask_decoder import MaskDecoder
from sam_flax.layers import MLP
from sam_flax.sam import Params, Sam, call


class Batch(NamedTuple):
    """B images with P prompted objects each; pixel coordinates are those of the canvas."""

    images: jax.Array  # (B, S, S, 3) uint8
    masks: jax.Array  # (B, P, 4g, 4g) uint8, 0..255 coverage of each mask cell
    boxes: jax.Array  # (B, P, 4) float32 prompt boxes, xyxy
    points: jax.Array  # (B, P, 2) float32 prompt points, xy
    is_point: jax.Array  # (B, P) bool: prompted by its point instead of its box
    mask_noise: jax.Array  # (B, P, g, g) float32: perturbs the mask prompt; NaN-free
    has_mask: jax.Array  # (B, P) bool: a rough mask is given as well
    weight: jax.Array  # (B, P) float32: 0 for padding prompts


class LossWeights(NamedTuple):
    focal: float = 3.0
    dice: float = 1.0
    multimask: float = 0.5
    iou: float = 1.0
    dense: float = 0.4
    token: float = 0.6


def auxiliary_head(dim: int) -> MLP:
    """Mean embedding of an object -> weights over the upscaled features; used in training only."""
    return MLP(dim, dim, dim // 8, 2)


def normalise(sam: Sam, images: jax.Array) -> jax.Array:
    """uint8 -> the encoder's input, (B, S, S, 3)."""
    mean, std = jnp.array(sam.config.pixel_mean), jnp.array(sam.config.pixel_std)
    return (images.astype(jnp.float32) - mean) / std


def upscale(sam: Sam, params: Params, embedding: jax.Array) -> jax.Array:
    """The decoder's upscaling applied to the embedding alone: (B, g, g, C) -> (B, 4g, 4g, C/8)."""

    def run(module: MaskDecoder, x: jax.Array) -> jax.Array:
        return module.output_upscaling(x)

    decoder = MaskDecoder(sam.config, parent=None)
    return nn.apply(run, decoder)({"params": params["mask_decoder"]}, embedding)


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
    p = nn.sigmoid(logits)
    overlap, total = (p * target).sum((-2, -1)), (p + target).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def mask_iou(logits: jax.Array, target: jax.Array) -> jax.Array:
    a, b = logits > 0, target > 0.5
    return (a & b).sum((-2, -1)) / jnp.maximum((a | b).sum((-2, -1)), 1)


def dense_loss(
    sam: Sam, params: Params, embedding: jax.Array, upscaled: jax.Array, target: jax.Array, region: jax.Array
) -> jax.Array:
    """The object's mean embedding must find the object in its box: (B, P)."""
    b, p, size, _ = target.shape
    g = sam.config.grid
    coarse = target.reshape(b, p, g, size // g, g, size // g).mean((3, 5))
    coarse = coarse / (coarse.sum((-2, -1), keepdims=True) + 1e-3)
    mean = jnp.einsum("bpij,bijc->bpc", coarse, embedding)
    head = auxiliary_head(sam.config.out_chans)
    weights = call(head, params["auxiliary"], mean)
    return balanced_bce(jnp.einsum("bpc,bijc->bpij", weights, upscaled), target, region)


def pretrain_loss(sam: Sam, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Encoder and upscaling alone, no prompts."""
    target = batch.masks.astype(jnp.float32) / 255
    embedding = call(sam, params, normalise(sam, batch.images), method="encode_image")
    region = box_region(batch.boxes, sam.config.img_size, target.shape[-1])
    dense = dense_loss(sam, params, embedding, upscale(sam, params, embedding), target, region)
    loss = _weighted(dense, batch.weight)
    return loss, {"loss": loss, "dense": loss}


def joint_loss(
    sam: Sam, params: Params, batch: Batch, weights: LossWeights, freeze_encoder: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The full objective; with `freeze_encoder` no gradient is computed for the image encoder."""
    config = sam.config
    b, p = batch.weight.shape
    n, size = b * p, config.mask_size
    target = batch.masks.astype(jnp.float32) / 255  # (B, P, 4g, 4g)
    embedding = call(sam, params, normalise(sam, batch.images), method="encode_image")
    if freeze_encoder:
        embedding = jax.lax.stop_gradient(embedding)

    sparse, dense_prompt = _encode_prompts(sam, params, batch, target)
    repeated = jnp.repeat(embedding, p, axis=0)
    logits, iou_pred, hyper = _decode(sam, params, repeated, sparse, dense_prompt)

    flat = target.reshape(n, 1, size, size)
    region = box_region(batch.boxes, config.img_size, size)
    area = region.sum((-2, -1)).reshape(n, 1) + 1.0
    per_mask = weights.focal * focal_loss(logits, flat, area) + weights.dice * dice_loss(logits, flat)
    single, multi = per_mask[:, 0], per_mask[:, 1:].min(axis=1)
    iou = mask_iou(logits, flat)
    iou_loss = jnp.square(iou_pred - iou).mean(-1)

    upscaled = upscale(sam, params, embedding)
    token_logits = jnp.einsum("bpc,bijc->bpij", hyper.reshape(b, p, -1), upscaled)
    token = balanced_bce(token_logits, target, region)
    dense = dense_loss(sam, params, embedding, upscaled, target, region)

    w = batch.weight.reshape(n)
    total = (
        _weighted(single + weights.multimask * multi + weights.iou * iou_loss, w)
        + weights.token * _weighted(token, batch.weight)
        + weights.dense * _weighted(dense, batch.weight)
    )
    box = w * ~batch.is_point.reshape(n)
    point = w * batch.is_point.reshape(n)
    metrics = {
        "loss": total,
        "dense": _weighted(dense, batch.weight),
        "token": _weighted(token, batch.weight),
        "box_iou": _weighted(iou[:, 0], box),
        "point_iou": _weighted(iou[:, 1:].max(-1), point),
    }
    return total, metrics


def _weighted(values: jax.Array, weight: jax.Array) -> jax.Array:
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def _encode_prompts(sam: Sam, params: Params, batch: Batch, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Box or point prompts, both two tokens long, some with a rough mask: (N, 2, C), (N, g, g, C)."""
    config = sam.config
    n, g, size = batch.weight.size, config.grid, config.mask_size
    labels = jnp.ones((n, 1), jnp.int32)
    points = (batch.points.reshape(n, 1, 2), labels)
    # The rough mask: the true one moved by smooth noise, in logits like those the decoder returns.
    noise = jax.image.resize(batch.mask_noise.reshape(n, g, g), (n, size, size), "linear")
    rough = 8.0 * (target.reshape(n, size, size) - 0.5) + 4.0 * noise
    by_point, masked = call(sam, params, points, None, rough[..., None], method="encode_prompts")
    by_box, unmasked = call(sam, params, None, batch.boxes.reshape(n, 4), None, method="encode_prompts")
    sparse = jnp.where(batch.is_point.reshape(n, 1, 1), by_point, by_box)
    dense = jnp.where(batch.has_mask.reshape(n, 1, 1, 1), masked, unmasked)
    return sparse, dense


def _decode(
    sam: Sam, params: Params, embedding: jax.Array, sparse: jax.Array, dense: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All four masks, predicted IoUs, and the single-mask token's weights over the upscaled features (N, C/8)."""

    def run(module: Sam) -> tuple[jax.Array, jax.Array]:
        pe = module.prompt_encoder.get_dense_pe()
        return module.mask_decoder(embedding, pe, sparse, dense)

    hyper: list[jax.Array] = []

    def capture(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name == "output_hypernetworks_mlps_0":
            hyper.append(out)
        return out

    with nn.intercept_methods(capture):
        logits, iou = nn.apply(run, Sam(sam.config))({"params": params})
    return logits, iou, hyper[-1]
