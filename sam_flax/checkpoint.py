"""Loads a SAM from anybody's file, and writes and reads our own.

Ours is one safetensors file whose metadata carries the whole configuration.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as _serialize

from sam_flax.config import SamConfig
from sam_flax.convert import convert_freeing
from sam_flax.sam import Params, Sam
from sam_flax.tensor_files import PathLike, file_kind, read_safetensors, write_whole
from sam_flax.torch_archive import read_torch_file
from sam_flax.trees import as_float, check_tree, flatten, nest

WEIGHTS = Path(__file__).parent / "weights"
# What ships, by the name that `load_sam` takes.
PACKAGED = {"mini": WEIGHTS / "mini.safetensors", "mini-scenes": WEIGHTS / "mini_scenes.safetensors"}
FORMAT = "sam_flax"
VERSION = "1"


def load_sam(path: PathLike, *, decoder_num_heads: int | None = None) -> tuple[Sam, Params]:
    """Loads a Segment Anything model.

    Args:
        path: an official `.pth`, a `.safetensors` with Meta's or Hugging Face's names, a file by
            `save_params`, "mini" for the model that ships, or "mini-scenes" for its predecessor. The content decides,
            not the extension.
        decoder_num_heads: heads of the mask decoder, for weights that are not ours and not a published SAM's.

    Returns:
        The Linen module, with its configuration, and its parameters as JAX arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, harmful, of another kind, or not a SAM; the sentence says which.
    """
    if path in PACKAGED:
        path = PACKAGED[str(path)]
        if not path.exists():
            raise FileNotFoundError(
                f"The packaged weights {path} are missing; reinstall the package or run experiments.train_mini."
            )
    path = Path(path)
    source = f"Checkpoint {path}"
    if file_kind(path) == "torch":
        config, params = convert_freeing(read_torch_file(path), decoder_num_heads, source)
    else:
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") == FORMAT:
            config, params = _from_own(path, tensors, metadata)
            if decoder_num_heads not in (None, config.decoder_num_heads):
                raise ValueError(
                    f"{source} was saved with decoder_num_heads={config.decoder_num_heads}, not "
                    f"{decoder_num_heads}; leave the argument out."
                )
        elif metadata.get("format") == "ahcptq_jax":
            raise ValueError(f"{source} is a quantized model; load it with ahcptq_jax.load.")
        else:
            config, params = convert_freeing(tensors, decoder_num_heads, source)
    return Sam(config), jax.tree.map(jnp.asarray, params)


def load_params(path: PathLike) -> tuple[SamConfig, Params]:
    """Reads what `save_params` wrote.

    Args:
        path: the file.

    Returns:
        The configuration and the tree of float32 arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or its tensors do not fit its configuration.
    """
    path = Path(path)
    if file_kind(path) == "torch":
        raise ValueError(f"Checkpoint {path} was written by torch.save, not by save_params; use load_sam.")
    tensors, metadata = read_safetensors(path)
    return _from_own(path, tensors, metadata)


def save_params(
    path: PathLike,
    config: SamConfig,
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
        ValueError: if the tree does not fit `config`, a value is not finite in `dtype`, or `path` is no place
            for a file.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"save_params cannot write {path}; give a file name in an existing directory.")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"save_params got dtype={dtype!r}; use 'float32' or 'float16'.")
    flat = flatten(params)
    source = f"Parameter tree for {path}"
    check_tree(config, flat, source)
    tensors = {k: np.ascontiguousarray(as_float(k, v, source, dtype)) for k, v in sorted(flat.items())}
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config.to_dict(), sort_keys=True)}
    data = _serialize(tensors, metadata)
    # The package writes metadata in random order; sorted, equal models are equal files.
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, (struct.pack("<Q", len(text)), text, memoryview(data)[8 + length :]))


def _from_own(path: Path, tensors: dict[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[SamConfig, Params]:
    source = f"Checkpoint {path}"
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source} was not written by save_params; use load_sam for other people's weights.")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{source} is of format version {metadata.get('version')!r} and this package reads "
            f"{VERSION!r}; use the package version that wrote it."
        )
    config = parse_config(metadata.get("config", ""), source)
    counts = (config.depth, config.decoder_depth, config.num_multimask_outputs, config.iou_head_depth)
    if max(counts) > len(tensors):
        raise ValueError(f"{source} has a configuration of more layers than its {len(tensors)} tensors; save it again.")
    check_tree(config, tensors, source)
    return config, nest({k: as_float(k, v, source) for k, v in tensors.items()})


def parse_config(text: str, source: str) -> SamConfig:
    """The configuration in a file's metadata, with its types checked: the file may come from anywhere.

    Raises:
        ValueError: if it is no configuration; the sentence starts with `source`.
    """
    remedy = "save it again with save_params"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{source} has no readable configuration in its metadata; {remedy}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} has a configuration that is not a JSON object; {remedy}.")
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        real = name in ("mlp_ratio", "mask_threshold", "pixel_mean", "pixel_std")
        listed = name in ("global_attn_indexes", "pixel_mean", "pixel_std")
        smallest = 0 if listed or name in ("window_size", "num_multimask_outputs") else 1
        sound = isinstance(value, list) == listed and all(
            -1e6 < item < 1e6 if real and type(item) is float else type(item) is int and abs(item) < 1 << 31
            for item in items
        )
        if (
            not sound
            or (not real and min(items, default=smallest) < smallest)
            or (name.startswith("pixel") and len(items) != 3)
        ):
            raise ValueError(f"{source} has {name[:40]} = {str(value)[:40]} in its configuration; {remedy}.")
    try:
        return SamConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source} has an unusable configuration: {error}") from None
