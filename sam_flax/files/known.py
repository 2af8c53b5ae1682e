"""What a user says of a checkpoint that its names and shapes do not show."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from sam_flax.config import SegmenterConfig
from sam_flax.errors import InputError

MAX_IMG_SIZE = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """Arguments of `load_sam` and `convert` about the model; None where the user is silent.

    Raises:
        InputError: if a value is impossible for any SAM.
    """

    decoder_num_heads: int | None = None
    img_size: int | None = None
    global_attn_indexes: Sequence[int] | None = None
    pixel_mean: Sequence[float] | None = None
    pixel_std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        heads, size = self.decoder_num_heads, self.img_size
        if heads is not None and not (_is_integer(heads) and heads >= 1):
            raise InputError(f"decoder_num_heads={heads!r} is no number of heads; give 8, or leave it out.")
        if size is not None and not (_is_integer(size) and 1 <= size <= MAX_IMG_SIZE):
            raise InputError(
                f"img_size={size!r} is no side of an image in pixels, 1 to {MAX_IMG_SIZE}; give the size that the "
                "model was trained at, or leave it out."
            )
        blocks = self.global_attn_indexes
        if blocks is not None:
            if not isinstance(blocks, Sequence) or not all(_is_integer(i) and i >= 0 for i in blocks):
                raise InputError(
                    f"global_attn_indexes={blocks!r} are no indexes of encoder blocks; give those that attend "
                    "globally, such as (2, 5, 8, 11)."
                )
            object.__setattr__(self, "global_attn_indexes", tuple(sorted({int(i) for i in blocks})))
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _colour(name, value))

    def statistics(self) -> dict[str, Any]:
        """The pixel statistics that are given, as fields of a configuration."""
        given = {"pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std}
        return {name: value for name, value in given.items() if value is not None}

    def grid(self, native: int, patch_size: int) -> int:
        """Tokens along a side at the size asked for, which is the checkpoint's own, `native` tokens, unless given.

        Raises:
            InputError: if the size is no multiple of the patch size.
        """
        if self.img_size is None:
            return native
        if self.img_size % patch_size:
            raise InputError(
                f"img_size={self.img_size} is no multiple of the model's patch size {patch_size}; give one, such as "
                f"{max(1, round(self.img_size / patch_size)) * patch_size}."
            )
        return self.img_size // patch_size

    def check_own(self, config: SegmenterConfig, source: str) -> None:
        """Raises InputError if a file that says its decoder heads itself says others."""
        if self.decoder_num_heads not in (None, config.decoder_num_heads):
            raise InputError(
                f"{source} was saved with decoder_num_heads={config.decoder_num_heads}, not "
                f"{self.decoder_num_heads}; leave the argument out."
            )


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _colour(name: str, value: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        numbers = ()
    positive = name != "pixel_std" or all(v > 0 for v in numbers)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or not positive:
        raise InputError(
            f"{name}={value!r} are not the three values, red, green and blue, that it takes; give numbers on the scale "
            f"0 to 255{' above 0' if name == 'pixel_std' else ''}."
        )
    return numbers
