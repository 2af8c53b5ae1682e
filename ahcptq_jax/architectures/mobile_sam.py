"""MobileSAM: TinyViT's stages, units and recipe, and its attentions with a table of biases on codes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ahcptq_jax.architectures import sam_heads
from ahcptq_jax.architectures.base import (
    Architecture,
    AttentionCodes,
    Operation,
    Rewritable,
    RunOnCodes,
    Shape,
    Unit,
    register,
)
from ahcptq_jax.rules import FLOAT, Rule
from sam_flax.encoders import attention, tiny_vit
from sam_flax.encoders.tiny_vit import MobileSamConfig
from sam_flax.errors import InputError
from sam_flax.files.checkpoint import parse_config
from sam_flax.files.families import entries_of
from sam_flax.heads import mask_decoder
from sam_flax.mobile_sam import MobileSam
from sam_flax.sam import Params
from sam_flax.stages import StageGraph

_BLOCK = r"image_encoder/blocks_\d+"
_CONVS = r"image_encoder/(blocks|merges)_\d+"

# As SAM's where there is a counterpart. Of three convolutions the first takes the residual stream, whose channels are
# of any size, and the last what a GELU leaves, as an MLP's two linears do. Strided and depthwise ones, whose borders
# need a level of zero, are uniform, with a weight scale for each channel like all others. The first convolution takes
# the image and stays in floating point, as patch embeddings do.
RULES = (
    Rule(r"image_encoder/patch_embed/conv1/conv/input", FLOAT),
    Rule(r"image_encoder/patch_embed/conv2/conv/input", "uniform"),
    Rule(_CONVS + r"/conv1/conv/input", "grouped"),
    Rule(_CONVS + r"/conv2/conv/input", "uniform"),
    Rule(_CONVS + r"/conv3/conv/input", "hybrid"),
    Rule(_BLOCK + r"/attn/qkv/input", "grouped"),
    Rule(_BLOCK + r"/attn/proj/input", "uniform"),
    Rule(_BLOCK + r"/attn/[qkv]", "uniform"),
    Rule(_BLOCK + r"/attn/softmax", "log2"),
    Rule(_BLOCK + r"/local_conv/conv/input", "uniform"),
    Rule(_BLOCK + r"/mlp/lin1/input", "grouped"),
    Rule(_BLOCK + r"/mlp/lin2/input", "hybrid"),
    Rule(r"image_encoder/neck/conv[12]/input", "uniform"),
    *sam_heads.RULES,
)


class MobileSamArchitecture(Architecture):
    """The family of `sam_flax.mobile_sam.MobileSam`; see `Architecture` for its methods."""

    name = "mobile_sam"
    rules = RULES
    parts = sam_heads.PARTS
    decoder_parts = sam_heads.DECODER_PARTS
    transforms = ("fold_norms",)
    bimodal = sam_heads.BIMODAL
    focused = sam_heads.ATTENTION
    attentions: ClassVar[Mapping[type[nn.Module], RunOnCodes]] = {}

    def fits(self, sam: Any) -> bool:
        return isinstance(sam, MobileSam)

    def module(self, config: Any) -> MobileSam | None:
        return MobileSam(config) if isinstance(config, MobileSamConfig) else None

    def parse_config(self, text: str, source: str) -> MobileSamConfig:
        config = parse_config(text, source)
        if not isinstance(config, MobileSamConfig):
            raise InputError(f"{source} has the configuration of another family than MobileSAM.")
        return config

    def most_repeated(self, config: MobileSamConfig) -> int:
        return config.layers()

    def stages(self, sam: MobileSam) -> StageGraph:
        return sam.stages()

    def embed(self, sam: MobileSam, params: Params, images: Float[Array, "b s s 3"]) -> Float[Array, "b s s 3"]:
        return sam.embed(params, images)

    def encoder_units(self, sam: MobileSam, granularity: str = "part") -> list[Unit]:
        if granularity == "stage":
            raise InputError(f"granularity='stage' is for plain ViT encoders, not for {self.name}; use part or block.")
        units: list[Unit] = []
        for stage in sam.stages().stages:
            whole, prefix = stage.prefix.rstrip("/"), stage.prefix
            before = (units[-1].name,) if units else stage.inputs
            if granularity == "part" and isinstance(stage.module, tiny_vit.AttentionBlock):
                attend, mlp = (Operation(stage.module, f"{part}_part") for part in ("attention", "mlp"))
                first = Unit(prefix + "attn", prefix, ("norm1", "attn"), attend, "encoder_attention", inputs=before)
                members = ("local_conv", "norm2", "mlp")
                units += [first, Unit(prefix + "mlp", prefix, members, mlp, "encoder_mlp", inputs=(first.name,))]
                continue
            neck = stage.key == "neck"
            part, axis = ("neck", -1) if neck else ("encoder_block", 1)
            units.append(Unit(whole, prefix, (), Operation(stage.module), part, loss_axis=axis, inputs=before))
        return units

    def decoder_units(self, sam: MobileSam) -> list[Unit]:
        return sam_heads.decoder_units(sam.config)

    def whole_decoder(self, sam: MobileSam) -> Unit:
        return sam_heads.whole_decoder(sam.config)

    def shapes(self, sam: MobileSam) -> dict[str, Shape]:
        return {entry.path: entry.shape for entry in entries_of(sam.config)}

    def attention_map(
        self, q: Float[Array, "*g m d"], k: Float[Array, "*g n d"], *biases: Float[Array, "..."]
    ) -> Float[Array, "*g m n"]:
        """See `Architecture.attention_map`; the encoder's attentions add one bias for each pair of tokens."""
        return attention.attention_probabilities(q, k, *biases) if biases else super().attention_map(q, k)

    def rewritable(self, sam: MobileSam) -> Rewritable:
        config, norms = sam.config, []
        for index in range(config.depths[0], sum(config.depths)):
            block = f"image_encoder/blocks_{index}"
            # Windows are padded before the norm, so that offsets behind it reach the padding too.
            norms.append((f"{block}/norm1", f"{block}/attn/qkv", True))
            norms.append((f"{block}/norm2", f"{block}/mlp/lin1", True))
        norms.append(("image_encoder/neck/norm1", "image_encoder/neck/conv2", False))
        return Rewritable(tuple(norms), *sam_heads.rewritable(config))


def _attention(module: tiny_vit.Attention, codes: AttentionCodes, x: jax.Array) -> jax.Array:
    """`tiny_vit.Attention.__call__` on codes."""
    q, k, v = (codes.encode(name, a) for name, a in zip("qkv", module.split(x), strict=True))
    biases = module.biases()

    def attend(*part: jax.Array) -> tuple[jax.Array, ...]:
        out, of_map = codes.attend(*part, biases)
        return (out, of_map.astype(jnp.uint8)) if codes.recording else (out,)

    out, *of_map = attention.attend_in_parts(attend, q, codes.across(k), v, split_queries=False)
    if codes.recording:
        codes.record("softmax", of_map[0])
    return module.join(out, (x.shape[1], x.shape[2]))


MobileSamArchitecture.attentions = {
    tiny_vit.Attention: _attention,
    mask_decoder.Attention: sam_heads.attention_on_codes,
}
MOBILE_SAM = register(MobileSamArchitecture())
