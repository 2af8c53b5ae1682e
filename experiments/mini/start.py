"""Parameters that training starts from."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mini.forward import auxiliary_head
from sam_flax.config import SamConfig, SegmenterConfig
from sam_flax.sam import Params
from sam_flax.segmenter import Segmenter

# Cycles of the positional features over half the canvas. With lower ones than a token wide a box is blurred, with
# higher ones the decoder does not find it for long: trials at 16 and 20 tokens across learned with 3, not with 12.
FREQUENCIES = (0.125, 0.2)  # lowest, and highest times the tokens across


def init_params(sam: Segmenter, seed: int) -> Params:
    """Random parameters with the starts that make a small SAM learn at once.

    The Fourier matrix has moderate frequencies, the first self-attention (which has no residual) is near the
    identity, and the patch embedding of a plain ViT is a rotated cosine basis.
    """
    key = jax.random.key(seed)
    params = sam.init_params(key)
    rng = np.random.default_rng(seed)
    config = sam.config
    c = config.out_chans

    angle = rng.uniform(0, 2 * np.pi, c // 2)
    low, high = FREQUENCIES[0], FREQUENCIES[1] * config.grid
    radius = np.exp(rng.uniform(np.log(low), np.log(high), c // 2))
    matrix = np.stack([np.cos(angle), np.sin(angle)]) * radius
    params["prompt_encoder"]["pe_layer"]["positional_encoding_gaussian_matrix"] = matrix.astype(np.float32)

    first = params["mask_decoder"]["transformer"]["layers_0"]["self_attn"]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        first[name]["kernel"] = np.eye(c, dtype=np.float32) + 0.02 * np.asarray(first[name]["kernel"])

    if isinstance(config, SamConfig):
        params["image_encoder"]["patch_embed"]["proj"]["kernel"] = cosine_patches(rng, config)
    return with_auxiliary({k: dict(v) for k, v in params.items()}, config, seed)


def with_auxiliary(params: Params, config: SegmenterConfig, seed: int) -> Params:
    """The parameters in float32 and those of the heads that only training has, drawn anew."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    auxiliary = auxiliary_head(config.out_chans).init(key, jnp.zeros((1, config.out_chans)))["params"]
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {**params, "auxiliary": auxiliary})


def cosine_patches(rng: np.random.Generator, config: SamConfig) -> np.ndarray:
    """The lowest-frequency 2-D cosines of each colour, randomly rotated: (p, p, 3, D)."""
    p, d = config.patch_size, config.embed_dim
    k = np.arange(p)
    basis = np.cos(np.pi * (k[None, :] + 0.5) * k[:, None] / p)  # [frequency, pixel]
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    order = sorted((i + j, i, j) for i in range(p) for j in range(p))
    waves = [np.outer(basis[i], basis[j]) for _, i, j in order][: -(-d // 3)]
    filters = np.stack([wave[:, :, None] * np.eye(3)[colour] for wave in waves for colour in range(3)])[:d]
    rotation, _ = np.linalg.qr(rng.normal(size=(len(filters), d)).T)
    # The mean of a patch has about p times the amplitude of its details; a quarter keeps tokens near unit size.
    return (0.25 * np.tensordot(filters, rotation.T, axes=(0, 0))).astype(np.float32)
