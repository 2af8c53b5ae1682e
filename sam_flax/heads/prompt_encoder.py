"""Points, boxes and masks to embeddings (modeling/prompt_encoder.py)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from sam_flax.config import SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.layers import PatchConv, gelu, layer_norm


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of coordinates x, y in 0..1."""

    num_pos_feats: int

    @nn.compact
    def __call__(self, coords: Float[Array, "*batch 2"]) -> Float[Array, "*batch 2*{self.num_pos_feats}"]:
        matrix = self.param("positional_encoding_gaussian_matrix", nn.initializers.normal(1.0), (2, self.num_pos_feats))
        angles = 2 * np.pi * ((2 * coords - 1) @ matrix)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MaskDownscaling(nn.Module):
    """Mask prompt (4g x 4g) to a dense embedding (g x g)."""

    mask_in_chans: int
    embed_dim: int

    def setup(self) -> None:
        c = self.mask_in_chans
        self.conv1, self.norm1 = PatchConv(1, c // 4, 2), layer_norm()
        self.conv2, self.norm2 = PatchConv(c // 4, c, 2), layer_norm()
        self.conv3 = PatchConv(c, self.embed_dim, 1)

    def __call__(self, x: Float[Array, "n h w 1"]) -> Float[Array, "n h//4 w//4 c"]:
        x = gelu(self.norm1(self.conv1(x)))
        x = gelu(self.norm2(self.conv2(x)))
        return self.conv3(x)


class PromptEncoder(nn.Module):
    """Embeds prompts given in pixels of the model's canvas."""

    config: SegmenterConfig

    def setup(self) -> None:
        c = self.config.out_chans
        normal = nn.initializers.normal(1.0)
        self.pe_layer = PositionEmbeddingRandom(c // 2)
        self.point_embeddings = self.param("point_embeddings", normal, (4, c))
        self.not_a_point_embed = self.param("not_a_point_embed", normal, (1, c))
        self.no_mask_embed = self.param("no_mask_embed", normal, (1, c))
        self.mask_downscaling = MaskDownscaling(self.config.mask_in_chans, c)

    def get_dense_pe(self) -> Float[Array, "1 g g c"]:
        """Positional encoding of every token of the image embedding."""
        g = self.config.grid
        centres = (jnp.arange(g) + 0.5) / g
        xs, ys = jnp.meshgrid(centres, centres)
        return self.pe_layer(jnp.stack([xs, ys], axis=-1))[None]

    def _embed_pixels(self, coords: Float[Array, "*batch 2"]) -> Float[Array, "*batch c"]:
        # +0.5 moves to the centre of the pixel.
        return self.pe_layer((coords + 0.5) / self.config.img_size)

    def _embed_points(
        self, coords: Float[Array, "n p 2"], labels: Integer[Array, "n p"], pad: bool
    ) -> Float[Array, "n p+{int(pad)} c"]:
        if pad:
            coords = jnp.concatenate([coords, jnp.zeros_like(coords[:, :1])], axis=1)
            labels = jnp.concatenate([labels, -jnp.ones_like(labels[:, :1])], axis=1)
        kind = labels[..., None]
        embedding = jnp.where(kind == -1, self.not_a_point_embed, self._embed_pixels(coords))
        embedding += jnp.where(kind == 0, self.point_embeddings[0], 0.0)
        return embedding + jnp.where(kind == 1, self.point_embeddings[1], 0.0)

    def _embed_boxes(self, boxes: Float[Array, "n 4"]) -> Float[Array, "n 2 c"]:
        return self._embed_pixels(boxes.reshape(-1, 2, 2)) + self.point_embeddings[2:4]

    def _embed_masks(self, masks: Float[Array, "n h w 1"] | None, n: Any) -> Float[Array, "n g g c"]:
        if masks is None:
            g, c = self.config.grid, self.config.out_chans
            return jnp.broadcast_to(self.no_mask_embed[:, None, None, :], (n, g, g, c))
        return self.mask_downscaling(masks)

    def __call__(
        self,
        points: tuple[Float[Array, "points p 2"], Integer[Array, "points p"]] | None,
        boxes: Float[Array, "boxes 4"] | None,
        masks: Float[Array, "masks side side 1"] | None,
    ) -> tuple[Float[Array, "n t c"], Float[Array, "n g g c"]]:
        """Embeds N prompts.

        Args:
            points: p points for each prompt as x, y pixels, with labels: 1 object, 0 background, -1 padding; or None.
            boxes: x0, y0, x1, y1 in pixels, or None.
            masks: logits, or None.

        Returns:
            Sparse embeddings, of t = p (+1 padding point where there is no box) + 2 per box tokens, and dense ones.

        Raises:
            InputError: if there is no prompt, or points, boxes and masks differ in number.
        """
        # Not len(): the number may be a symbol when the graph is exported.
        sizes = {a.shape[0] for a in (points[0] if points else None, boxes, masks) if a is not None}
        if len(sizes) != 1:
            raise InputError(
                f"Prompts must agree on their number and at least one must be given, but they have sizes "
                f"{sorted(sizes)}; give points, boxes and masks of the same length."
            )
        n = sizes.pop()
        parts = [jnp.zeros((n, 0, self.config.out_chans))]
        if points is not None:
            parts.append(self._embed_points(points[0], points[1], pad=boxes is None))
        if boxes is not None:
            parts.append(self._embed_boxes(boxes))
        return jnp.concatenate(parts, axis=1), self._embed_masks(masks, n)
