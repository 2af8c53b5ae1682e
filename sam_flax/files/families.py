"""Which family of models a checkpoint is of, by the names in it, and what each family's checkpoints are like."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from sam_flax.config import DEFAULT_DECODER_HEADS, SamConfig, SegmenterConfig
from sam_flax.encoders.hiera import Sam2Config
from sam_flax.encoders.tiny_vit import MobileSamConfig
from sam_flax.errors import InputError
from sam_flax.files import mobile_sam, sam2
from sam_flax.files.assembly import Shapes, assemble
from sam_flax.files.infer import merge_tied
from sam_flax.files.known import Known
from sam_flax.files.parameters import Dims, Entry, distinct, parameter_table
from sam_flax.files.trees import shown
from sam_flax.mobile_sam import MobileSam
from sam_flax.sam import Sam
from sam_flax.sam2 import Sam2
from sam_flax.segmenter import Params, Segmenter


@dataclasses.dataclass(frozen=True)
class Naming:
    """One way in which the checkpoints of a family name their tensors.

    Attributes:
        anchor: a name that every such checkpoint has, and no other family's.
        hugging_face: which of an entry's names these are.
        used: whether a tensor belongs to the model as it is used on images.
    """

    anchor: str
    hugging_face: bool
    used: Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models in files.

    Attributes:
        title: what people call it.
        config: class of its configurations.
        module: class of its modules.
        table: configuration -> every parameter.
        namings: of other people's checkpoints; none for plain-ViT SAMs, whose names `infer.match` tells.
        infer: shapes by name, whether they are Hugging Face's, and the fields of the heads -> configuration.
    """

    title: str
    config: type[SegmenterConfig]
    module: type[Segmenter]
    table: Callable[[Any], list[Entry]]
    namings: tuple[Naming, ...] = ()
    infer: Callable[[Shapes, bool, dict[str, Any]], SegmenterConfig] | None = None


FAMILIES: dict[str, Family] = {
    "sam_vit": Family("SAM", SamConfig, Sam, lambda config: parameter_table(Dims.from_config(config))),
    "mobile_sam": Family(
        "MobileSAM",
        MobileSamConfig,
        MobileSam,
        mobile_sam.table,
        (Naming(mobile_sam.ANCHOR, False, mobile_sam.used),),
        lambda shapes, _, heads: mobile_sam.infer(shapes, heads),
    ),
    "sam2": Family(
        "SAM 2",
        Sam2Config,
        Sam2,
        sam2.table,
        (Naming(sam2.ANCHOR, False, sam2.used), Naming(sam2.HF_ANCHOR, True, sam2.hf_used)),
        sam2.infer,
    ),
}
# SAM-HQ adds a token, an MLP and features of early blocks, of which nothing here knows.
_HQ = re.compile(r"(?:^|\.)mask_decoder\.(?:hf_token|hq_token)\.")


def module_of(config: SegmenterConfig) -> Segmenter:
    """The module of a configuration.

    Raises:
        InputError: if its family is unknown.
    """
    return _family(config.family).module(config)


def entries_of(config: SegmenterConfig) -> list[Entry]:
    """Every parameter of the model of a configuration."""
    return _family(config.family).table(config)


def config_class(family: str) -> type[SegmenterConfig]:
    """The class of the configurations of a family, as files name it."""
    return _family(family).config


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise InputError(f"The family {name!r} of models is unknown; known are {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]


def convert_other(
    state_dict: dict[str, Any], config: SegmenterConfig | None, known: Known, source: str
) -> tuple[SegmenterConfig, Params] | None:
    """Converts a state dict that is not a plain-ViT SAM's, and empties it.

    Args:
        state_dict: name -> array.
        config: the configuration, where shapes do not show it; None infers it.
        known: what else the user says.
        source: what to call the state dict in errors.

    Returns:
        The configuration and the tree of float32 arrays; None if it is of no other family.

    Raises:
        ValueError: if it is of a family that is not supported, or damaged.
    """
    if odd := next((name for name in state_dict if _HQ.search(name)), None):
        raise InputError(f"{source} is a SAM-HQ (it has {shown(odd)}), which is not supported; use a plain SAM.")
    for family in FAMILIES.values():
        for naming in family.namings:
            found = next((name for name in state_dict if ("." + name).endswith("." + naming.anchor)), None)
            if found is None or family.infer is None:
                continue
            tensors = _without_prefix(state_dict, found.removesuffix(naming.anchor), source)
            tensors = {name: value for name, value in tensors.items() if naming.used(name)}
            state_dict.clear()
            if naming.hugging_face:
                merge_tied(tensors, source)
            if config is None:
                shapes = Shapes(tensors, source, family.title)
                heads = _heads(shapes, naming.hugging_face, known.decoder_num_heads)
                try:
                    config = family.infer(shapes, naming.hugging_face, heads)
                except InputError:
                    raise
                except ValueError as error:
                    raise InputError(f"{source} implies an impossible configuration: {error}") from None
            elif type(config) is not family.config:
                raise InputError(f"{source} is a {family.title}, but config is a {type(config).__name__}.")
            return assemble(told(config, known), family.table(config), naming.hugging_face, tensors, source)
    return None


def told(config: SegmenterConfig, known: Known) -> SegmenterConfig:
    """The configuration with the pixel statistics and the canvas that the user says.

    For families without a table of positions for each token, which run on a canvas of any size.
    """
    grid = known.grid(config.grid, config.patch_size)
    return dataclasses.replace(config, **known.statistics(), img_size=grid * config.patch_size)


def _without_prefix(state_dict: Mapping[str, Any], prefix: str, source: str) -> dict[str, Any]:
    """The tensors by their names without what stands before most of them, such as `module.`."""
    result: dict[str, Any] = {}
    for name, value in state_dict.items():
        short = name.removeprefix(prefix)
        if short in result:
            raise InputError(
                f"{source} holds {shown(short)} twice, with and without the prefix {prefix!r}; keep one of them."
            )
        result[short] = value
    return result


def _heads(shapes: Shapes, hugging_face: bool, decoder_num_heads: int | None) -> dict[str, Any]:
    """The fields of a configuration that belong to the prompt encoder and the decoder; `sam_` may stand before both."""
    sam2 = "sam_mask_decoder.iou_token.weight" in shapes
    prompts, decoder = ("sam_prompt_encoder", "sam_mask_decoder") if sam2 else ("prompt_encoder", "mask_decoder")
    first = "mask_embed.conv" if hugging_face else "mask_downscaling."
    conv = f"{prompts}.{first}{2 if hugging_face else 3}.weight"
    iou = f"{decoder}.iou_prediction_head"
    mlp = f"{decoder}.transformer.layers.0.mlp"
    lin1 = next((n for n in ("lin1", "layers.0", "proj_in") if f"{mlp}.{n}.weight" in shapes), "lin1")
    depth = distinct(shapes, iou.replace(".", r"\.") + r"\.layers\.(\d+)\.")
    return {
        "out_chans": shapes.size(f"{decoder}.mask_tokens.weight", 1),
        "mask_in_chans": shapes.size(conv, 0),
        "decoder_depth": distinct(shapes, decoder + r"\.transformer\.layers\.(\d+)\."),
        "decoder_num_heads": DEFAULT_DECODER_HEADS if decoder_num_heads is None else decoder_num_heads,
        "decoder_mlp_dim": shapes.size(f"{mlp}.{lin1}.weight", 0),
        "num_multimask_outputs": shapes.size(f"{decoder}.mask_tokens.weight", 0) - 1,
        "iou_head_depth": depth + 2 * hugging_face,  # proj_in and proj_out
        "iou_head_hidden_dim": shapes.size(f"{iou}.{'proj_in' if hugging_face else 'layers.0'}.weight", 0),
    }
