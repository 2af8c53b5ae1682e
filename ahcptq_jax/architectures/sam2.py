"""SAM 2 on images: Hiera's stages, units and recipe, and its attentions with pooled queries on codes."""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ahcptq_jax.architectures import sam_heads
from ahcptq_jax.architectures.base import (
    AttentionCodes,
    Operation,
    Rewritable,
    RunOnCodes,
    Unit,
    register,
)
from ahcptq_jax.rules import Rule
from sam_flax.encoders import attention, hiera
from sam_flax.encoders.hiera import Sam2Config
from sam_flax.errors import InputError
from sam_flax.heads import mask_decoder
from sam_flax.layers import in_float32
from sam_flax.sam import Params
from sam_flax.sam2 import Sam2
from sam_flax.segmenter import call, check_canvas
from sam_flax.stages import EMBEDDED, Stage, StageGraph

_BLOCK = r"image_encoder/blocks_\d+"

# As SAM's where there is a counterpart. The shortcut of a block that widens takes the same norm as its attention. The
# neck takes residual streams, whose channels are of any size. The patch embedding stays in floating point.
RULES = (
    Rule(_BLOCK + r"/(attn/qkv|proj)/input", "grouped"),
    Rule(_BLOCK + r"/attn/proj/input", "uniform"),
    Rule(_BLOCK + r"/attn/[qkv]", "uniform"),
    Rule(_BLOCK + r"/attn/softmax", "log2"),
    Rule(_BLOCK + r"/mlp/lin1/input", "grouped"),
    Rule(_BLOCK + r"/mlp/lin2/input", "hybrid"),
    Rule(r"image_encoder/neck/convs_\d/input", "grouped"),
    Rule(r"image_encoder/neck/high_res_\d/input", "uniform"),
    *sam_heads.RULES,
)


class Sam2Architecture(sam_heads.SamFamily):
    """The family of `sam_flax.sam2.Sam2`; see `Architecture` for its methods."""

    name = "sam2"
    segmenter = Sam2
    configuration = Sam2Config
    rules = RULES
    attentions: ClassVar[Mapping[type[nn.Module], RunOnCodes]] = {}

    def stages(self, sam: Sam2) -> StageGraph:
        """See `Architecture.stages`; the model's own first stage, the patch embedding, is `embed` here."""
        first, *rest = sam.stages().stages
        behind = tuple(EMBEDDED if key == first.key else key for key in rest[0].inputs)
        return StageGraph((Stage(rest[0].key, rest[0].prefix, rest[0].module, behind), *rest[1:]), (rest[-1].key,))

    def embed(self, sam: Sam2, params: Params, images: Float[Array, "b s s 3"]) -> Float[Array, "b side side c"]:
        check_canvas(images, sam.config)
        first = sam.stages().stages[0]
        return _embed(first.module, params["image_encoder"][first.key], images)

    def encoder_units(self, sam: Sam2, granularity: str = "part") -> list[Unit]:
        if granularity == "stage":
            raise InputError(f"granularity='stage' is for plain ViT encoders, not for {self.name}; use part or block.")
        units: list[Unit] = []
        outputs = {EMBEDDED: EMBEDDED}  # of stages -> the names of the units that make them
        *blocks, neck = self.stages(sam).stages
        for stage in blocks:
            prefix, before = stage.prefix, tuple(outputs[key] for key in stage.inputs)
            if granularity == "block":
                whole = prefix.rstrip("/")
                units.append(Unit(whole, prefix, (), Operation(stage.module), "encoder_block", inputs=before))
            else:
                attend, mlp = (Operation(stage.module, f"{part}_part") for part in ("attention", "mlp"))
                own = ("norm1", "attn", "proj")
                first = Unit(prefix + "attn", prefix, own, attend, "encoder_attention", inputs=before)
                units += [
                    first,
                    Unit(prefix + "mlp", prefix, ("norm2", "mlp"), mlp, "encoder_mlp", inputs=(first.name,)),
                ]
            outputs[stage.key] = units[-1].name
        # One unit for each of the neck's outputs, as `Features` has them.
        levels = [outputs[key] for key in neck.inputs]
        for method, members, inputs in (
            ("embedding", ("convs_2", "convs_3", "no_mem_embed"), levels[2:]),
            ("quarter", ("convs_0", "high_res_0"), levels[:1]),
            ("eighth", ("convs_1", "high_res_1"), levels[1:2]),
        ):
            operation, name = Operation(neck.module, method), neck.prefix + method
            units.append(Unit(name, neck.prefix, members, operation, "neck", loss_axis=-1, inputs=tuple(inputs)))
        return units

    def unit_outputs(self, sam: Sam2, granularity: str = "part") -> tuple[str, ...]:
        return tuple(unit.name for unit in self.encoder_units(sam, granularity)[-3:])

    def rewritable(self, sam: Sam2) -> Rewritable:
        config, norms = sam.config, []
        widening = set(accumulate(config.depths[:-1]))
        for index in range(sum(config.depths)):
            block = f"image_encoder/blocks_{index}"
            if index not in widening:  # where the shortcut does not take the same norm
                whole = not hiera.make_block(config, index).window
                norms.append((f"{block}/norm1", f"{block}/attn/qkv", whole))
            norms.append((f"{block}/norm2", f"{block}/mlp/lin1", True))
        return Rewritable(tuple(norms), *sam_heads.rewritable(config))


@partial(jax.jit, static_argnums=0)
@in_float32
def _embed(module: nn.Module, params: Params, images: jax.Array) -> jax.Array:
    return call(module, params, images)


def _attention(module: hiera.Attention, codes: AttentionCodes, x: jax.Array) -> jax.Array:
    """`hiera.Attention.__call__` on codes."""
    q, k, v = (codes.encode(name, a) for name, a in zip("qkv", module.split(x), strict=True))

    def attend(*part: jax.Array) -> tuple[jax.Array, ...]:
        out, of_map = codes.attend(*part)
        return (out, of_map.astype(jnp.uint8)) if codes.recording else (out,)

    out, *of_map = attention.attend_in_parts(attend, q, codes.across(k), v, split_queries=True)
    if codes.recording:
        codes.record("softmax", of_map[0])
    return module.join(out, x.shape[1:3])


Sam2Architecture.attentions = {hiera.Attention: _attention, mask_decoder.Attention: sam_heads.attention_on_codes}
SAM2 = register(Sam2Architecture())
