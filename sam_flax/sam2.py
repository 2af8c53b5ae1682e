"""SAM 2 on images: SAM's heads, grown by high-resolution features and an object score, behind Hiera.

Not part of it is the memory of earlier frames. A user of videos would need its encoder, the attention to memories that
takes the place of `no_mem_embed`, the pointers to objects, and the loop over frames that keeps both.
"""

from typing import Any

import flax.linen as nn
import jax

from sam_flax.encoders.hiera import Features, Hiera, Sam2Config, stage_graph
from sam_flax.heads.sam2_heads import Sam2MaskDecoder, Sam2PromptEncoder, single_mask
from sam_flax.segmenter import Points, Segmenter
from sam_flax.stages import StageGraph


class Sam2(Segmenter):
    """SAM 2 and 2.1 as their image predictor uses them."""

    config: Sam2Config

    @nn.nowrap
    def make_encoder(self) -> Hiera:
        return Hiera(self.config)

    @nn.nowrap
    def make_heads(self) -> tuple[Sam2PromptEncoder, Sam2MaskDecoder]:
        return Sam2PromptEncoder(self.config), Sam2MaskDecoder(self.config)

    @nn.nowrap
    def stages(self) -> StageGraph:
        return stage_graph(self.config)

    def decode_masks(
        self, image_embeddings: Any, sparse: jax.Array, dense: jax.Array, multimask_output: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """`Features` -> logits (N, M, 4g, 4g), predicted IoU (N, M); `multimask_output`: M = 3, else 1."""
        return self.decode_scored(image_embeddings, sparse, dense, multimask_output)[:2]

    def decode_scored(
        self, features: Features, sparse: jax.Array, dense: jax.Array, multimask_output: bool = True
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `decode_masks`, with the logit of there being an object, (N, 1): below 0 it is hidden or none."""
        images, prompts = features[0].shape[0], sparse.shape[0]
        if images not in (1, prompts):
            raise ValueError(
                f"There are features of {images} images for {prompts} prompts; give one for all or one for each."
            )
        pe = self.prompt_encoder.get_dense_pe()
        logits, iou, score = self.mask_decoder(Features(*features), pe, sparse, dense)
        if multimask_output:
            return logits[:, 1:], iou[:, 1:], score
        c = self.config
        return *single_mask(logits, iou, c.stability_delta, c.stability_threshold), score

    def object_scores(
        self,
        image_embeddings: Any,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (N, 1) of there being an object at prompts as for `decode`."""
        return self.decode_scored(image_embeddings, *self.encode_prompts(points, boxes, masks))[2]
