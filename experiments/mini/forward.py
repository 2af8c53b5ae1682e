"""The model's forward pass in training: many prompts an image, in a chosen precision, with what the losses look at."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_flax.encoders import vit
from sam_flax.encoders.hiera import Features
from sam_flax.layers import MLP
from sam_flax.sam import Params, call
from sam_flax.segmenter import Segmenter


class Prompts(NamedTuple):
    """P prompts on each of B images: Q points, or a box in the place of the first of them; a mask or none."""

    boxes: jax.Array  # (B, P, 4)
    boxed: jax.Array  # (B, P) bool
    points: jax.Array  # (B, P, Q, 2)
    labels: jax.Array  # (B, P, Q): 1 object, 0 background
    masks: jax.Array  # (B, P, m, m) logits
    masked: jax.Array  # (B, P) bool


class Decoded(NamedTuple):
    """What the decoder answers, the single mask first."""

    logits: jax.Array  # (B, P, 4, m, m) float32
    iou: jax.Array  # (B, P, 4) float32, predicted
    hyper: jax.Array  # (B, P, C/8): the single mask's weights over the upscaled features


def auxiliary_head(dim: int) -> MLP:
    """Mean embedding of an object -> weights over the upscaled features; used in training only."""
    return MLP(dim, dim, dim // 8, 2)


def normalise(sam: Segmenter, images: jax.Array) -> jax.Array:
    """Colours 0..255 -> the encoder's input, (B, S, S, 3)."""
    mean, std = jnp.array(sam.config.pixel_mean), jnp.array(sam.config.pixel_std)
    return (images.astype(jnp.float32) - mean) / std


def in_precision(params: Params, precision: jnp.dtype) -> Params:
    """Parameters as a forward pass in that precision takes them."""
    return jax.tree.map(lambda a: a.astype(precision), params)


@contextlib.contextmanager
def whole_attention() -> Iterator[None]:
    """Lets an accelerator hold attention maps whole while the encoder is traced.

    The library bounds them for SAM-H's sake; in parts, one after another, MINI's would leave an accelerator idle.
    """
    bound = vit.MAX_ATTENTION_BYTES
    vit.MAX_ATTENTION_BYTES = 2**40
    try:
        yield
    finally:
        vit.MAX_ATTENTION_BYTES = bound


def encode(sam: Segmenter, params: Params, images: jax.Array, precision: jnp.dtype) -> Any:
    """Images (B, S, S, 3), 0..255 -> what the decoder takes: embeddings (B, g, g, C), or SAM 2's `Features`."""
    cast = {"image_encoder": in_precision(params["image_encoder"], precision)}
    with whole_attention():
        return call(sam, cast, normalise(sam, images).astype(precision), method="encode_image")


def embedding_of(features: Any) -> jax.Array:
    """The embeddings (B, g, g, C) among what `encode` makes."""
    return features.embedding if isinstance(features, Features) else features


def upscale(sam: Segmenter, params: Params, features: Any) -> jax.Array:
    """The decoder's upscaling applied to what `encode` makes alone: (B, 4g, 4g, C/8)."""

    def run(module: Any) -> jax.Array:
        return module.output_upscaling(*(features if isinstance(features, Features) else (features,)))

    decoder = in_precision(params["mask_decoder"], embedding_of(features).dtype)
    return nn.apply(run, sam.make_heads()[1])({"params": decoder})


def encode_prompts(sam: Segmenter, params: Params, prompts: Prompts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sparse (N, Q + 1, C), dense (N, g, g, C) and the positions of the image, float32.

    The tokens are those that the model's prompt encoder makes: a box and Q - 1 points, or Q points and a padding point.
    """
    b, p = prompts.boxed.shape
    n, size = b * p, prompts.masks.shape[-1]
    encoder = {"prompt_encoder": params["prompt_encoder"]}

    def embed(points: Any, boxes: Any, masks: Any) -> tuple[jax.Array, jax.Array]:
        return call(sam, encoder, points, boxes, masks, method="encode_prompts")

    boxes = prompts.boxes.reshape(n, 4)
    points, labels = prompts.points.reshape(n, -1, 2), prompts.labels.reshape(n, -1)
    beside = (points[:, 1:], labels[:, 1:]) if labels.shape[1] > 1 else None
    with_box, unmasked = embed(beside, boxes, None)
    without, _ = embed((points, labels), None, None)
    if missing := with_box.shape[1] - without.shape[1]:
        # SAM 2 has a padding token behind boxes, too: behind points that token stands twice here.
        without = jnp.concatenate([without, jnp.repeat(without[:, -1:], missing, axis=1)], axis=1)
    sparse = jnp.where(prompts.boxed.reshape(n, 1, 1), with_box, without)
    _, masked = embed(None, boxes, prompts.masks.reshape(n, size, size, 1))
    dense = jnp.where(prompts.masked.reshape(n, 1, 1, 1), masked, unmasked)

    def positions(module: Segmenter) -> jax.Array:
        return module.prompt_encoder.get_dense_pe()

    return sparse, dense, nn.apply(positions, sam)({"params": encoder})


def decode(sam: Segmenter, params: Params, features: Any, prompts: Prompts) -> Decoded:
    """All four masks of every prompt, in the precision of `features`, which `encode` makes, but for the positions."""
    b, p = prompts.boxed.shape
    precision = embedding_of(features).dtype
    sparse, dense, positions = (a.astype(precision) for a in encode_prompts(sam, params, prompts))
    repeated = jax.tree.map(lambda a: jnp.repeat(a, p, axis=0), features)
    decoder = {"params": in_precision(params["mask_decoder"], precision)}
    hyper: list[jax.Array] = []

    def capture(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        if context.module.name == "output_hypernetworks_mlps_0":
            hyper.append(out)
        return out

    with nn.intercept_methods(capture):
        answer: Any = sam.make_heads()[1].apply(decoder, repeated, positions, sparse, dense)
    logits, iou = (a.astype(jnp.float32) for a in answer[:2])
    return Decoded(logits.reshape(b, p, *logits.shape[1:]), iou.reshape(b, p, -1), hyper[-1].reshape(b, p, -1))
