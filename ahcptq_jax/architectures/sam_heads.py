"""What families with SAM's prompt encoder and mask decoder share: recipe and units of these, attention on codes."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ahcptq_jax.architectures.base import Architecture, AttentionCodes, Operation, Shape, Unit
from ahcptq_jax.rules import FLOAT, Rule
from sam_flax.config import SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.files.checkpoint import parse_config
from sam_flax.files.families import entries_of
from sam_flax.heads import mask_decoder
from sam_flax.layers import MLPBlock
from sam_flax.segmenter import Params, Segmenter
from sam_flax.stages import StageGraph

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
DECODER_PARTS = ("prompt_encoder", "mask_decoder")
TRANSFORMER = r"mask_decoder/transformer"
# Of the objective of the whole decoder, see `Masks`: an error of 0.1 in IoU counts like one of 1 in a row of logits.
REACH, IOU_WEIGHT = 8.0, 10.0
ATTENTION = TRANSFORMER + r"/(layers_\d+/\w+_attn|layers_\d+/cross_attn_\w+|final_attn_token_to_image)"
# Parts with sites, none of which the method quantizes.
_FLOAT_HEADS = r"mask_decoder/(output_hypernetworks_mlps_\d+|iou_prediction_head|pred_obj_score_head)"
# Tokens attending to the image: the attentions whose keys BIG inspects.
BIMODAL = TRANSFORMER + r"/(layers_\d+/cross_attn|final_attn)_token_to_image"

# METHOD section 5. What has no site stays in floating point anyway: norms, prompt encoder and output upscaling.
RULES = (
    Rule(ATTENTION + r"/[qkv]_proj/input", "grouped"),
    Rule(ATTENTION + r"/out_proj/input", "uniform"),
    Rule(ATTENTION + r"/[qkv]", "uniform"),
    Rule(ATTENTION + r"/softmax", "log2"),
    Rule(TRANSFORMER + r"/layers_\d+/mlp/lin1/input", "grouped"),
    Rule(TRANSFORMER + r"/layers_\d+/mlp/lin2/input", "hybrid"),
    Rule(_FLOAT_HEADS + r"/layers_\d+/input", FLOAT),
)


class SamFamily(Architecture):
    """A family of segmenters of `sam_flax`, with SAM's heads; see `Architecture` for its methods.

    Attributes:
        segmenter: the module.
        configuration: the type of its configuration.
    """

    segmenter: ClassVar[type[Segmenter]]
    configuration: ClassVar[type[SegmenterConfig]]
    parts = PARTS
    decoder_parts = DECODER_PARTS
    bimodal = BIMODAL
    focused = ATTENTION

    def fits(self, sam: Any) -> bool:
        return isinstance(sam, self.segmenter)

    def module(self, config: Any) -> Segmenter | None:
        return self.segmenter(config) if isinstance(config, self.configuration) else None

    def parse_config(self, text: str, source: str) -> Any:
        config = parse_config(text, source)
        if not isinstance(config, self.configuration):
            raise InputError(f"{source} has the configuration of another family than {self.name}.")
        return config

    def most_repeated(self, config: Any) -> int:
        return config.layers()

    def stages(self, sam: Any) -> StageGraph:
        return sam.stages()

    def embed(self, sam: Any, params: Params, images: Float[Array, "b s s 3"]) -> Any:
        return sam.embed(params, images)

    def decoder_units(self, sam: Any) -> list[Unit]:
        return decoder_units(sam.config)

    def shapes(self, sam: Any) -> dict[str, Shape]:
        return {entry.path: entry.shape for entry in entries_of(sam.config)}


class Masks(mask_decoder.MaskDecoder):
    """The mask decoder as far as its masks are seen: its logits where they are near the threshold, and its IoU.

    A logit of 20 is as good as one of 10, so that logits are bent to `REACH` at most. The predicted IoU, which ranks
    the masks, is a further row of each mask, `IOU_WEIGHT` times as large.
    """

    def __call__(  # type: ignore[override]
        self,
        image_embeddings: Float[Array, "images g g c"],
        image_pe: Float[Array, "_ g g c"],
        sparse: Float[Array, "n t c"],
        dense: Float[Array, "n g g c"],
    ) -> Float[Array, "n masks 4*g+1 4*g"]:
        """Arguments as of `MaskDecoder`; of several images, prompts of the first come first, then the second's."""
        images = jnp.repeat(image_embeddings, dense.shape[0] // image_embeddings.shape[0], axis=0)
        logits, iou = super().__call__(images, image_pe[:1], sparse, dense)
        bent = REACH * jnp.tanh(logits / REACH)
        row = jnp.broadcast_to(IOU_WEIGHT * iou[..., None, None], (*bent.shape[:2], 1, bent.shape[3]))
        return jnp.concatenate([bent, row], axis=2)


def whole_decoder(config: SegmenterConfig) -> Unit:
    """See `Architecture.whole_decoder`."""
    operation = Operation(Masks(config, parent=None))
    return Unit("mask_decoder", "mask_decoder/", (), operation, "decoder", loss_axis=2)


def decoder_units(config: SegmenterConfig) -> list[Unit]:
    """See `Architecture.decoder_units`."""
    dim, heads = config.out_chans, config.decoder_num_heads
    own = Operation(mask_decoder.Attention(dim, heads, parent=None))
    cross = Operation(mask_decoder.Attention(dim, heads, downsample_rate=2, parent=None))
    mlp = Operation(MLPBlock(dim, config.decoder_mlp_dim, nn.relu, parent=None))
    units = []
    for i in range(config.decoder_depth):
        for child, operation, part in (
            ("self_attn", own, "decoder_attention"),
            ("cross_attn_token_to_image", cross, "decoder_attention"),
            ("mlp", mlp, "decoder_mlp"),
            ("cross_attn_image_to_token", cross, "decoder_attention"),
        ):
            name = f"{TRANSFORMER}/layers_{i}/{child}"
            units.append(Unit(name, name + "/", (), operation, part))
    name = f"{TRANSFORMER}/final_attn_token_to_image"
    return [*units, Unit(name, name + "/", (), cross, "decoder_attention")]


def rewritable(
    config: SegmenterConfig,
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...], tuple[str, ...]]:
    """The `hidden`, the `keys` and the `scores` of a decoder's `Rewritable`."""
    layers = [f"{TRANSFORMER}/layers_{index}" for index in range(config.decoder_depth)]
    final = f"{TRANSFORMER}/final_attn_token_to_image"
    keys = [f"{final}/k_proj", *(f"{layer}/cross_attn_token_to_image/k_proj" for layer in layers)]
    names = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    scores = [final, *(f"{layer}/{name}" for layer in layers for name in names)]
    return tuple((f"{layer}/mlp/lin1", f"{layer}/mlp/lin2") for layer in layers), tuple(keys), tuple(scores)


def attention_on_codes(
    module: mask_decoder.Attention, codes: AttentionCodes, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """`mask_decoder.Attention.__call__` on codes."""
    separate = module.separate_heads
    values = separate(module.q_proj(q)), separate(module.k_proj(k)), separate(module.v_proj(v))
    q, k, v = (codes.encode(name, a) for name, a in zip("qkv", values, strict=True))
    out, of_map = codes.attend(q, codes.across(k), v)
    codes.record("softmax", of_map)
    return module.out_proj(out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1))
