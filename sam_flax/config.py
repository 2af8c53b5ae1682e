"""The hyper-parameters of a Segment Anything model, of every family, and the published variants of the first.

Source: segment_anything/build_sam.py and modeling/*.py (facebookresearch/segment-anything).
"""

import dataclasses
from typing import Any, ClassVar, Literal, Self

from sam_flax.errors import InputError

# Heads of the mask decoder in every published SAM. Shapes do not show them.
DEFAULT_DECODER_HEADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """What the prompt encoder, the mask decoder and the preprocessing of every promptable segmenter need.

    A family of models adds what its image encoder needs. Hashable, so that it can be a static argument of `jax.jit`.

    Raises:
        InputError: if a size does not divide where it must.
    """

    family: ClassVar[str]  # files name it
    # How a picture becomes the canvas: its longer side resized and the rest padded, or both sides resized.
    resize: ClassVar[Literal["pad", "squash"]] = "pad"
    # Low-resolution logits that are handed out are cut to this size; None hands them out as they are.
    logit_limit: ClassVar[float | None] = None

    img_size: int  # side of the square input canvas, pixels
    patch_size: int  # side of one token of the image embedding, pixels
    out_chans: int = 256  # C: width of the image embedding, the prompts and the decoder
    mask_in_chans: int = 16  # hidden width of the mask-prompt convolutions
    decoder_depth: int = 2  # two-way blocks
    decoder_num_heads: int = DEFAULT_DECODER_HEADS
    decoder_mlp_dim: int = 2048
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, 0..255
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    mask_threshold: float = 0.0  # on mask logits

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            if isinstance(value, int) and value < 1:
                raise InputError(f"{field.name}={value} must be at least 1.")
        if self.img_size % self.patch_size:
            raise InputError(
                f"img_size={self.img_size} is not a multiple of patch_size={self.patch_size}; change one of them."
            )
        if self.out_chans % (2 * self.decoder_num_heads) or self.out_chans % 8:
            raise InputError(
                f"out_chans={self.out_chans} must be a multiple of 8 and of 2*decoder_num_heads="
                f"{2 * self.decoder_num_heads}."
            )

    @property
    def grid(self) -> int:
        """Tokens along one side of the image embedding."""
        return self.img_size // self.patch_size

    @property
    def image_embedding_size(self) -> tuple[int, int]:
        """(height, width) of the image embedding, tokens."""
        return (self.grid, self.grid)

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution mask logits, pixels: four per token."""
        return 4 * self.grid

    def layers(self) -> int:
        """The largest number of modules of one kind: a file of fewer tensors cannot be of this configuration."""
        return max(self.decoder_depth, self.num_multimask_outputs, self.iou_head_depth)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict, with the family's name unless it is the first; `from_dict` is its inverse."""
        family = {} if self.family == SamConfig.family else {"family": self.family}
        return family | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds a config from `to_dict` output.

        Raises:
            InputError: if fields are unknown or missing.
        """
        values = dict(values)
        if values.pop("family", cls.family) != cls.family:
            raise InputError(f"This is no configuration of the family {cls.family!r}.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"SAM configuration has unknown fields {unknown}; known are {sorted(known)}.")
        try:
            fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"SAM configuration is incomplete or mistyped: {error}.") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamConfig(SegmenterConfig):
    """Everything that fixes the computation graph of a SAM; the numbers live in the parameter pytree.

    Raises:
        InputError: if a size does not divide where it must.
    """

    family: ClassVar[str] = "sam_vit"

    embed_dim: int  # encoder width D
    depth: int  # encoder blocks
    num_heads: int  # encoder attention heads
    window_size: int  # side of a local attention window, tokens
    global_attn_indexes: tuple[int, ...]  # blocks that attend globally
    mlp_ratio: float = 4.0  # hidden / embed_dim of the encoder MLPs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}; change one of them."
            )
        if any(not 0 <= i < self.depth for i in self.global_attn_indexes):
            raise InputError(f"global_attn_indexes={self.global_attn_indexes} must lie in 0..depth-1={self.depth - 1}.")

    def layers(self) -> int:
        return max(self.depth, super().layers())

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def block_window(self, index: int) -> int:
        """Window size of encoder block `index`, 0 for global attention."""
        return 0 if index in self.global_attn_indexes else self.window_size


VIT_B = SamConfig(
    img_size=1024,
    patch_size=16,
    embed_dim=768,
    depth=12,
    num_heads=12,
    window_size=14,
    global_attn_indexes=(2, 5, 8, 11),
)
VIT_L = dataclasses.replace(VIT_B, embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))
VIT_H = dataclasses.replace(VIT_B, embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))
# The small SAM that ships: the same graph at laptop size, trained by experiments/train_mini.py.
MINI = SamConfig(
    img_size=256,
    patch_size=8,
    embed_dim=192,
    depth=6,
    num_heads=6,
    window_size=8,
    global_attn_indexes=(2, 5),
    out_chans=128,
    decoder_num_heads=4,
    decoder_mlp_dim=512,
    iou_head_hidden_dim=128,
)
# Its predecessor, smaller and trained on generated scenes, kept for the results that stand on it.
MINI_SCENES = SamConfig(
    img_size=160,
    patch_size=8,
    embed_dim=128,
    depth=5,
    num_heads=4,
    window_size=10,
    global_attn_indexes=(2, 4),
    out_chans=128,
    decoder_num_heads=4,
    decoder_mlp_dim=256,
    iou_head_hidden_dim=128,
)
CONFIGS = {"vit_b": VIT_B, "vit_l": VIT_L, "vit_h": VIT_H, "mini": MINI, "mini-scenes": MINI_SCENES}
