"""What SAM 2's prompt encoder and mask decoder do differently from SAM's (facebookresearch/sam2, modeling/sam)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_flax.encoders.hiera import Features, Sam2Config
from sam_flax.heads.mask_decoder import TwoWayTransformer
from sam_flax.heads.prompt_encoder import PromptEncoder
from sam_flax.layers import MLP, UpConv, gelu, layer_norm

Points = tuple[jax.Array, jax.Array]


class Sam2PromptEncoder(PromptEncoder):
    """SAM's prompt encoder, but that a padding point follows wherever there are points or boxes.

    So SAM 2's image predictor embeds boxes: as two more points before the others. The order of tokens does not matter.
    """

    def __call__(
        self, points: Points | None, boxes: jax.Array | None, masks: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        sparse, dense = super().__call__(points, boxes, masks)
        if boxes is not None:  # where there are only points, it is there already
            padding = jnp.broadcast_to(self.not_a_point_embed, (sparse.shape[0], 1, sparse.shape[-1]))
            sparse = jnp.concatenate([sparse, padding], axis=1)
        return sparse, dense


class Sam2Upscaling(nn.Module):
    """SAM's `OutputUpscaling` with the encoder's features added at both of its resolutions."""

    dim: int

    def setup(self) -> None:
        self.conv1, self.norm1 = UpConv(self.dim, self.dim // 4), layer_norm()
        self.conv2 = UpConv(self.dim // 4, self.dim // 8)

    def __call__(self, x: jax.Array, quarter: jax.Array, eighth: jax.Array) -> jax.Array:
        # (N, g, g, C), (1 or N, 4g, 4g, C/8), (1 or N, 2g, 2g, C/4) -> (N, 4g, 4g, C/8)
        return gelu(self.conv2(gelu(self.norm1(self.conv1(x) + eighth))) + quarter)


class Sam2MaskDecoder(nn.Module):
    """Features and prompt embeddings to mask logits, predicted IoU, and whether there is an object at all."""

    config: Sam2Config

    def setup(self) -> None:
        c = self.config
        dim, num_masks = c.out_chans, c.num_multimask_outputs + 1
        normal = nn.initializers.normal(1.0)
        self.transformer = TwoWayTransformer(c.decoder_depth, dim, c.decoder_num_heads, c.decoder_mlp_dim)
        self.obj_score_token = self.param("obj_score_token", normal, (1, dim))
        self.iou_token = self.param("iou_token", normal, (1, dim))
        self.mask_tokens = self.param("mask_tokens", normal, (num_masks, dim))
        self.output_upscaling = Sam2Upscaling(dim)
        self.output_hypernetworks_mlps = [MLP(dim, dim, dim // 8, 3) for _ in range(num_masks)]
        self.iou_prediction_head = MLP(dim, c.iou_head_hidden_dim, num_masks, c.iou_head_depth)
        self.pred_obj_score_head = MLP(dim, dim, 1, 3)

    def __call__(
        self, features: Features, image_pe: jax.Array, sparse: jax.Array, dense: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All masks of N prompts, the single-mask output first.

        Args:
            features: of one image, or of N.
            image_pe: (1, g, g, C).
            sparse: (N, T, C).
            dense: (N, g, g, C).

        Returns:
            logits (N, 1 + multimask, 4g, 4g), predicted IoU (N, 1 + multimask) in 0..1, and the logit of there being
            an object (N, 1).
        """
        n, g, _, dim = dense.shape
        outputs = jnp.concatenate([self.obj_score_token, self.iou_token, self.mask_tokens])
        tokens = jnp.concatenate([jnp.broadcast_to(outputs, (n, *outputs.shape)), sparse], axis=1)
        image = (features.embedding + dense).reshape(n, g * g, dim)
        pe = jnp.broadcast_to(image_pe.reshape(1, g * g, dim), image.shape)
        tokens, image = self.transformer(image, pe, tokens)

        upscaled = self.output_upscaling(image.reshape(n, g, g, dim), features.quarter, features.eighth)
        hyper = jnp.stack([mlp(tokens[:, 2 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], axis=1)
        logits = jnp.einsum("nmc,nhwc->nmhw", hyper, upscaled)
        iou = nn.sigmoid(self.iou_prediction_head(tokens[:, 1]))
        return logits, iou, self.pred_obj_score_head(tokens[:, 0])


def single_mask(logits: jax.Array, iou: jax.Array, delta: float, threshold: float) -> tuple[jax.Array, jax.Array]:
    """One mask of each prompt: the single-mask output where it is stable, elsewhere the best of the others.

    Stable is a mask that hardly changes when it is cut a little higher or lower.

    Args:
        logits: (N, 1 + multimask, m, m), the single-mask output first.
        iou: (N, 1 + multimask), predicted.
        delta: how far from 0 the two cuts are.
        threshold: IoU of the two cuts from which a mask is stable.

    Returns:
        (N, 1, m, m), (N, 1).
    """
    inner, outer = ((logits[:, 0] > cut).sum((-2, -1)).astype(jnp.float32) for cut in (delta, -delta))
    stable = jnp.where(outer > 0, inner / jnp.maximum(outer, 1.0), 1.0) >= threshold
    chosen = jnp.where(stable, 0, 1 + jnp.argmax(iou[:, 1:], axis=-1))
    picked = jnp.take_along_axis(logits, chosen[:, None, None, None], axis=1)
    return picked, jnp.take_along_axis(iou, chosen[:, None], axis=1)
