"""Loads a SAM from anybody's file, and writes and reads our own.

Ours is one safetensors file whose metadata carries the whole configuration.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sam_flax.config import SamConfig, SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.files.convert import adapt, convert_freeing
from sam_flax.files.families import config_class, entries_of, module_of
from sam_flax.files.known import Known
from sam_flax.files.tensor_files import PathLike, file_kind, read_safetensors, write_safetensors
from sam_flax.files.torch_archive import read_torch_file
from sam_flax.files.trees import ParamTree, as_float, by_path, check_tree, nested
from sam_flax.segmenter import Params

WEIGHTS = Path(__file__).parents[1] / "weights"
# What ships, by the name that `load_sam` takes.
PACKAGED = {"mini": WEIGHTS / "mini.safetensors", "mini-scenes": WEIGHTS / "mini_scenes.safetensors"}
FORMAT = "sam_flax"
VERSION = "1"


def load_sam(
    path: PathLike,
    *,
    decoder_num_heads: int | None = None,
    img_size: int | None = None,
    global_attn_indexes: Sequence[int] | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    config: SegmenterConfig | None = None,
) -> tuple[Any, ParamTree]:
    """Loads a promptable segmenter: a SAM with a plain ViT, or a MobileSAM. Names and shapes tell which.

    Args:
        path: an official `.pth` or `.pt`, a `.safetensors` with Meta's or Hugging Face's names, a training checkpoint
            that holds one of these beside other things, a file by `save_params`, "mini" for the model that ships, or
            "mini-scenes" for its predecessor. The content decides, not the extension.
        decoder_num_heads: heads of the mask decoder, which no file but ours says; 8, as in every published SAM, is
            assumed with a warning where the width of the decoder is another than theirs.
        img_size: side of the canvas in pixels, for a model that is to run at another size than its absolute positions
            are for: those are then interpolated bilinearly, and the relative positions of global blocks linearly.
        global_attn_indexes: encoder blocks that attend globally, where the file does not show which they are; an error
            asks for it.
        pixel_mean, pixel_std: RGB on the scale 0..255, for a model trained with others than the file says, or SAM's
            own where it says nothing.
        config: the configuration, for other people's weights whose names and shapes do not show it: a model that is no
            plain-ViT SAM and of no published size.

    Returns:
        The Linen module, a `Segmenter`, with its configuration, and its parameters as JAX arrays, which
        carry the configuration too.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if the file is damaged, harmful, of another kind, or not a SAM, or does not show what was not given
            either; the sentence says which.

    Warns:
        InputWarning: if the decoder's heads are assumed.
    """
    known = Known(
        decoder_num_heads=decoder_num_heads,
        img_size=img_size,
        global_attn_indexes=global_attn_indexes,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    if path in PACKAGED:
        path = PACKAGED[str(path)]
        if not path.exists():
            raise FileNotFoundError(
                f"The packaged weights {path} are missing; reinstall the package or run experiments.train_mini."
            )
    config, params = _load(Path(path), known, config)
    # An array that stands at several places is one array on the device too.
    arrays: dict[int, jax.Array] = {}
    leaves, structure = jax.tree.flatten(params)
    for leaf in leaves:
        if id(leaf) not in arrays:
            arrays[id(leaf)] = jnp.asarray(leaf)
    tree = jax.tree.unflatten(structure, [arrays[id(leaf)] for leaf in leaves])
    return module_of(config), ParamTree(tree, config)


def _load(path: Path, known: Known, config: SegmenterConfig | None) -> tuple[Any, Params]:
    """The configuration and the NumPy parameters of anybody's file."""
    source = f"Checkpoint {path}"
    if file_kind(path) == "torch":
        return convert_freeing(read_torch_file(path), known, source, config)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") == "ahcptq_jax":
        raise InputError(
            f"{source} is a quantized model; load it with ahcptq_jax.load, or on the command line with --artefact."
        )
    if metadata.get("format") == FORMAT:
        if config is not None:
            raise InputError(f"{source} says its configuration itself; leave config out.")
        config, params = _from_own(path, tensors, metadata)
        return adapt(config, params, known, source)
    return convert_freeing(tensors, known, source, config)


def load_params(path: PathLike) -> tuple[Any, Params]:
    """Reads what `save_params` wrote.

    Args:
        path: the file.

    Returns:
        The configuration and the tree of float32 arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: if it is not such a file, or its tensors do not fit its configuration.
    """
    path = Path(path)
    if file_kind(path) == "torch":
        raise InputError(f"Checkpoint {path} was written by torch.save, not by save_params; use load_sam.")
    tensors, metadata = read_safetensors(path)
    return _from_own(path, tensors, metadata)


def save_params(
    path: PathLike,
    config: SegmenterConfig,
    params: Mapping[str, Any],
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Writes a parameter tree and its configuration as one safetensors file, whole or not at all.

    The same arguments give the same bytes. Tensors are named by their path in the tree, joined by '/'; the
    metadata holds `format`, `version` and the configuration as JSON.

    Args:
        path: the file to write; an existing one is replaced.
        config: the configuration of `params`.
        params: our tree.
        dtype: type on disk; float16 halves the file and rounds the weights.

    Raises:
        InputError: if the tree does not fit `config`, a value is not finite in `dtype`, or `path` is no place
            for a file.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"save_params cannot write {path}; give a file name in an existing directory.")
    if dtype not in ("float32", "float16"):
        raise InputError(f"save_params got dtype={dtype!r}; use 'float32' or 'float16'.")
    flat = by_path(params)
    source = f"Parameter tree for {path}"
    check_tree(entries_of(config), flat, source)
    tensors = {k: np.ascontiguousarray(as_float(k, v, source, dtype)) for k, v in sorted(flat.items())}
    metadata = {"config": json.dumps(config.to_dict(), sort_keys=True), "format": FORMAT, "version": VERSION}
    write_safetensors(path, tensors, metadata)


def _from_own(path: Path, tensors: dict[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[Any, Params]:
    source = f"Checkpoint {path}"
    if metadata.get("format") != FORMAT:
        raise InputError(f"{source} was not written by save_params; use load_sam for other people's weights.")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{source} is of format version {metadata.get('version')!r} and this package reads "
            f"{VERSION!r}; use the package version that wrote it."
        )
    config = parse_config(metadata.get("config", ""), source)
    if config.layers() > len(tensors):
        raise InputError(f"{source} has a configuration of more layers than its {len(tensors)} tensors; save it again.")
    check_tree(entries_of(config), tensors, source)
    return config, nested({k: as_float(k, v, source) for k, v in tensors.items()})


def parse_config(text: str, source: str) -> Any:
    """The configuration in a file's metadata, with its types checked: the file may come from anywhere.

    Raises:
        InputError: if it is no configuration; the sentence starts with `source`.
    """
    remedy = "save it again with save_params"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{source} has no readable configuration in its metadata; {remedy}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{source} has a configuration that is not a JSON object; {remedy}.")
    family = values.pop("family", SamConfig.family)
    if not isinstance(family, str):
        raise InputError(f"{source} has a family of models that is not a name; {remedy}.")
    cls = config_class(family)
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in values.items():
        if name in types and not _is_of_type(name, value, types[name]):
            raise InputError(f"{source} has {name[:40]} = {str(value)[:40]} in its configuration; {remedy}.")
    try:
        return cls.from_dict(values)
    except ValueError as error:
        raise InputError(f"{source} has an unusable configuration: {error}") from None


def _is_of_type(name: str, value: Any, wanted: Any) -> bool:
    """Whether a value from JSON is of a field's type, `int`, `float` or a tuple of them, and of a sane size."""
    inner = get_args(wanted)
    listed = bool(inner)
    if isinstance(value, list) != listed:
        return False
    items = value if listed else [value]
    if listed and Ellipsis not in inner and len(items) != len(inner):
        return False
    if (inner[0] if listed else wanted) is float:
        return all(type(item) in (int, float) and -1e6 < item < 1e6 for item in items)
    smallest = 0 if listed or name in ("window_size", "num_multimask_outputs") else 1
    return all(type(item) is int and smallest <= item < 1 << 31 for item in items)
