"""MobileSAM: TinyViT's stages, units and recipe, and its attentions with a table of biases on codes."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahcptq_jax.architectures import sam_heads
from ahcptq_jax.architectures.base import (
    AttentionCodes,
    Operation,
    Rewritable,
    RunOnCodes,
    Unit,
    register,
)
from ahcptq_jax.rules import FLOAT, Rule
from sam_flax.encoders import attention, tiny_vit
from sam_flax.encoders.tiny_vit import MobileSamConfig
from sam_flax.errors import InputError
from sam_flax.heads import mask_decoder
from sam_flax.mobile_sam import MobileSam

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


class MobileSamArchitecture(sam_heads.SamFamily):
    """The family of `sam_flax.mobile_sam.MobileSam`; see `Architecture` for its methods."""

    name = "mobile_sam"
    segmenter = MobileSam
    configuration = MobileSamConfig
    rules = RULES
    transforms = ("fold_norms",)
    attentions: ClassVar[Mapping[type[nn.Module], RunOnCodes]] = {}

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

    def whole_decoder(self, sam: MobileSam) -> Unit:
        return sam_heads.whole_decoder(sam.config)

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
