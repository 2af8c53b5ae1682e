"""Segment Anything with its plain ViT encoder: stages, units, the official recipe, and its attentions on codes.

Everything in this package that knows a name or a shape of this model is in this file. Its modules are
`sam_flax.encoders.vit`, `sam_flax.heads` and `sam_flax.sam`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

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
from ahcptq_jax.architectures.sites import flatten
from ahcptq_jax.rules import Rule
from sam_flax.config import SamConfig
from sam_flax.encoders import vit
from sam_flax.errors import InputError
from sam_flax.files.families import entries_of
from sam_flax.files.infer import infer_config
from sam_flax.files.trees import check_tree
from sam_flax.heads import mask_decoder
from sam_flax.sam import Params, Sam, make_block, stage_graph
from sam_flax.stages import EMBEDDED, Stage

_BLOCK = r"image_encoder/blocks_\d+"

# METHOD section 5. What has no site stays in floating point anyway: patch embedding, positions and norms.
RULES = (
    Rule(_BLOCK + r"/attn/qkv/input", "grouped"),
    Rule(_BLOCK + r"/attn/proj/input", "uniform"),
    Rule(_BLOCK + r"/attn/[qkv]", "uniform"),
    Rule(_BLOCK + r"/attn/softmax", "log2"),
    Rule(_BLOCK + r"/mlp/lin1/input", "grouped"),
    Rule(_BLOCK + r"/mlp/lin2/input", "hybrid"),
    Rule(r"image_encoder/neck/conv[12]/input", "uniform"),
    *sam_heads.RULES,
)

# Fields of a configuration that shapes do not show; all others must agree with the parameters.
_NOT_IN_SHAPES = ("decoder_num_heads", "pixel_mean", "pixel_std", "mask_threshold")


class Blocks(nn.Module):
    """Several blocks of the encoder in a row, with the names that they have in it.

    Attributes:
        config: the model's.
        indexes: of the blocks.
    """

    config: SamConfig
    indexes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b g g c"]) -> Float[Array, "b g g c"]:
        for index in self.indexes:
            x = make_block(self.config, index).clone(parent=self, name=f"blocks_{index}")(x)
        return x


class SamVit(sam_heads.SamFamily):
    """The family of `sam_flax.Sam`; see `Architecture` for its methods."""

    name = "sam_vit"
    segmenter = Sam
    configuration = SamConfig
    rules = RULES
    transformer = sam_heads.TRANSFORMER

    def neck(self, sam: Sam) -> Stage:
        return stage_graph(sam.config).stages[-1]

    def encoder_units(self, sam: Sam, granularity: str = "part") -> list[Unit]:
        units: list[Unit] = []
        if granularity == "stage":
            units = _stage_units(sam.config)
            neck = self.neck(sam)
            inputs = (units[-1].name,)
            return [
                *units,
                Unit(neck.prefix.rstrip("/"), neck.prefix, (), Operation(neck.module), "neck", -1, inputs=inputs),
            ]
        for stage in stage_graph(sam.config).stages:
            whole, prefix = stage.prefix.rstrip("/"), stage.prefix
            before = (units[-1].name,) if units else (EMBEDDED,)
            if stage.key == "neck":
                units.append(Unit(whole, prefix, (), Operation(stage.module), "neck", loss_axis=-1, inputs=before))
                continue
            if granularity == "block":
                units.append(Unit(whole, prefix, (), Operation(stage.module), "encoder_block", inputs=before))
                continue
            attention = Operation(stage.module, "attention_part")
            # The MLP does not know of windows: the MLPs of all blocks are one function.
            mlp = Operation(stage.module.clone(window=0), "mlp_part")
            first = Unit(prefix + "attn", prefix, ("norm1", "attn"), attention, "encoder_attention", inputs=before)
            second = Unit(prefix + "mlp", prefix, ("norm2", "mlp"), mlp, "encoder_mlp", inputs=(first.name,))
            units += [first, second]
        return units

    def whole_decoder(self, sam: Sam) -> Unit:
        return sam_heads.whole_decoder(sam.config)

    def sites(self, sam: Sam) -> dict[str, int | None]:
        """See `Architecture.sites`; from the shapes of the parameters, since tracing a SAM-H takes seconds."""
        config = sam.config
        sites: dict[str, int | None] = {}
        for path, shape in self.shapes(sam).items():
            layer, _, leaf = path.rpartition("/")
            if leaf != "kernel" or not any(layer.startswith(part) for part in _PARTS_WITH_SITES):
                continue
            sites[f"{layer}/input"] = shape[-2]
            parent, _, name = layer.rpartition("/")
            if name in ("qkv", "q_proj"):
                width = config.head_dim if name == "qkv" else shape[-1] // config.decoder_num_heads
                sites |= {f"{parent}/{site}": width for site in "qkv"}
                sites[f"{parent}/softmax"] = None
        return sites

    def attention_map(
        self, q: Float[Array, "*g m d"], k: Float[Array, "*g n d"], *biases: Float[Array, "..."]
    ) -> Float[Array, "*g m n"]:
        """See `Architecture.attention_map`; the encoder's attentions add one bias for rows and one for columns."""
        if biases:
            bias_h, bias_w = biases
            return vit.attention_probabilities(q, k, bias_h, bias_w)
        return super().attention_map(q, k)

    def rewritable(self, sam: Sam) -> Rewritable:
        config = sam.config
        norms = []
        for index in range(config.depth):
            block, window = f"image_encoder/blocks_{index}", config.block_window(index)
            padded = bool(window) and config.grid % window != 0
            norms.append((f"{block}/norm1", f"{block}/attn/qkv", not padded))
            norms.append((f"{block}/norm2", f"{block}/mlp/lin1", True))
        norms.append(("image_encoder/neck/norm1", "image_encoder/neck/conv2", False))
        return Rewritable(tuple(norms), *sam_heads.rewritable(config))

    def check(self, sam: Sam, params: Params) -> None:
        # With one head every width is possible; the real number is not in the shapes.
        inferred = infer_config(params, decoder_num_heads=1)
        for name, (given, found) in _differences(sam.config, inferred).items():
            raise InputError(
                f"sam has {name}={given} but params are those of a SAM with {name}={found}; pass both results of one "
                "load_sam."
            )
        check_tree(entries_of(sam.config), flatten(params), "Parameter tree")

    attentions: ClassVar[Mapping[type[nn.Module], RunOnCodes]] = {}


def _stage_units(config: SamConfig) -> list[Unit]:
    """The encoder's blocks in runs that end with the next block of global attention; the last run may have none."""
    runs: list[list[int]] = [[]]
    for index in range(config.depth):
        runs[-1].append(index)
        if not config.block_window(index):
            runs.append([])
    units: list[Unit] = []
    for indexes in filter(None, runs):
        names = tuple(f"blocks_{index}" for index in indexes)
        before = (units[-1].name,) if units else (EMBEDDED,)
        operation = Operation(Blocks(config, tuple(indexes), parent=None))
        name = f"image_encoder/{names[0]}-{indexes[-1]}" if len(names) > 1 else f"image_encoder/{names[0]}"
        units.append(Unit(name, "image_encoder/", names, operation, "encoder_stage", inputs=before))
    return units


_PARTS_WITH_SITES = ("image_encoder/blocks_", "image_encoder/neck/", sam_heads.TRANSFORMER + "/") + tuple(
    f"mask_decoder/{head}" for head in ("output_hypernetworks_mlps_", "iou_prediction_head/")
)


def _differences(given: SamConfig, found: SamConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ, of those that shapes show: name -> both values."""

    def view(config: SamConfig) -> dict[str, Any]:
        values = config.to_dict()
        for name in _NOT_IN_SHAPES:
            del values[name]
        # Another ratio that gives the same hidden width is the same model.
        values["mlp_ratio"] = int(config.embed_dim * config.mlp_ratio) / config.embed_dim
        # A window as large as the grid is global attention.
        windows = [config.block_window(index) or config.grid for index in range(config.depth)]
        local = [window for window in windows if window != config.grid]
        values["window_size"] = local[0] if local else config.grid
        values["global_attn_indexes"] = tuple(i for i, window in enumerate(windows) if window == config.grid)
        return values

    one, other = view(given), view(found)
    return {name: (value, other[name]) for name, value in one.items() if value != other[name]}


def _encoder_attention(module: vit.Attention, codes: AttentionCodes, x: jax.Array) -> jax.Array:
    """`vit.Attention.__call__` on codes."""
    grid = (x.shape[1], x.shape[2])
    h, w = (module.size, module.size) if module.windowed else grid
    values = vit.split_heads(module.qkv.product(x), module.qkv.bias, (h, w), module.num_heads)
    q, k, v = (codes.encode(name, a) for name, a in zip("qkv", values, strict=True))

    def attend(part: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, of_map = codes.attend(*part)
        # One byte each: all maps of a block together can be large.
        return (out, of_map.astype(jnp.uint8)) if codes.recording else (out,)

    biases = vit.relative_biases(codes.decode("q", q), module.rel_pos_h, module.rel_pos_w, (h, w))
    out, *of_map = vit.attend_in_parts(attend, q, codes.across(k), v, *biases)
    if codes.recording:
        codes.record("softmax", of_map[0])
    out = out.reshape(-1, module.num_heads, h, w, out.shape[-1]).transpose(0, 2, 3, 1, 4)
    return module.proj(vit.window_unpartition(out.reshape(-1, h, w, module.dim), grid))


SamVit.attentions = {vit.Attention: _encoder_attention, mask_decoder.Attention: sam_heads.attention_on_codes}
SAM_VIT = register(SamVit())
