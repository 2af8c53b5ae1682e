"""The version of the code that makes a number: results of other code are never taken for this code's."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import ahcptq_jax
import sam_flax

# What decides scores: the models, their quantization, and here the images, the prompts and how masks are scored.
_PACKAGES = tuple(Path(str(package.__file__)).parent for package in (sam_flax, ahcptq_jax))
_HERE = Path(__file__).parents[1]
_FOLDERS = (*_PACKAGES, *(_HERE / name for name in ("coco", "evaluate", "scenes")))
_LIBRARIES = ("jax", "numpy", "pillow", "pycocotools")


@functools.cache
def code_version() -> str:
    """A digest, 16 hexadecimal digits, of the sources that decide scores and of the versions of their libraries."""
    digest = hashlib.sha256(" ".join(importlib.metadata.version(name) for name in _LIBRARIES).encode())
    for folder in _FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
