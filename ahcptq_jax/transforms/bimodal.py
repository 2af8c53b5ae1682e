"""BIG: detection of bimodal key projections, and the sign flips that make them unimodal (PTQ4SAM).

It runs once per layer before calibration, on the host, because the kernel density of one tensor is little work.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal
from jaxtyping import Array, Float, Float32, Float64, Int, PyTree, Shaped

from ahcptq_jax.architectures import Architecture
from ahcptq_jax.architectures.sites import below, flatten, intercept_sites, unflatten
from ahcptq_jax.transforms.base import Context, Transform, register, takes_nothing
from sam_flax.layers import in_float32
from sam_flax.sam import Params, call

GRID_POINTS = 128
PEAK_DISTANCE = 32
PEAK_HEIGHT = 0.01
MAX_SAMPLES = 16384


@dataclasses.dataclass(frozen=True)
class Density:
    """Kernel density of a tensor's values.

    Attributes:
        grid: values from the smallest to the largest.
        density: the estimated density there.
        peaks: indices into ``grid`` of the peaks found.
    """

    grid: Float64[np.ndarray, " points"]
    density: Float64[np.ndarray, " points"]
    peaks: Int[np.ndarray, " peaks"]

    @property
    def is_bimodal(self) -> bool:
        """Whether there are exactly two peaks."""
        return len(self.peaks) == 2


def estimate_density(
    values: Float[Array | np.ndarray, "..."] | Sequence[float], max_samples: int | None = MAX_SAMPLES
) -> Density:
    """Gaussian kernel density with Scott's bandwidth on 128 points, and its peaks.

    Args:
        values: the tensor; the official code passes the first calibration image's key projection.
        max_samples: above this many values an evenly spaced part of them is used (None: all); the bandwidth stays
            that of the full count, so that a larger tensor is not smoothed more.

    Raises:
        ValueError: if there are no values or some are not finite.

    Source: official ``LSQSignFakeQuantize.judge_bimodal``.
    """
    data = np.asarray(values, np.float64).reshape(-1)
    if data.size == 0 or not np.all(np.isfinite(data)):
        raise ValueError("bimodality needs finite values and at least one; check the calibration images")
    grid = np.linspace(data.min(), data.max(), GRID_POINTS)
    spread = data.std(ddof=1) if data.size > 1 else 0.0
    if spread == 0.0:
        return Density(grid, np.zeros(GRID_POINTS), np.zeros(0, np.int64))
    bandwidth = spread * data.size ** (-1 / 5)
    if max_samples is not None and data.size > max_samples:
        data = data[np.linspace(0, data.size - 1, max_samples).astype(np.int64)]
    # (GRID_POINTS, N)
    density = np.exp(-0.5 * ((grid[:, None] - data) / bandwidth) ** 2).mean(1) / (bandwidth * np.sqrt(2 * np.pi))
    peaks, _ = scipy.signal.find_peaks(density, height=PEAK_HEIGHT * density.sum(), distance=PEAK_DISTANCE)
    return Density(grid, density, peaks)


def is_bimodal(
    values: Float[Array | np.ndarray, "..."] | Sequence[float], max_samples: int | None = MAX_SAMPLES
) -> bool:
    """Whether the values have exactly two peaks; see ``estimate_density``."""
    return estimate_density(values, max_samples).is_bimodal


def channel_signs(channel_mean: Float[Array | np.ndarray, " c"] | Sequence[float]) -> Float32[np.ndarray, " c"]:
    """The signs that make every channel's mean non-negative: -1 where it is negative, else 1.

    (The official sign of a mean of exactly zero is zero, which would erase the channel.)
    """
    return np.where(np.asarray(channel_mean) < 0, -1.0, 1.0).astype(np.float32)


def flip_signs(
    q_params: Mapping[str, Any],
    k_params: Mapping[str, Any],
    channel_mean: Float[Array | np.ndarray, " c"] | Sequence[float],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flips the output channels of both projections whose key mean is negative; q.k is unchanged.

    Args:
        q_params: ``{"kernel": (in, C), "bias": (C,)}`` of the query projection; the bias may be absent.
        k_params: the same of the key projection.
        channel_mean: mean of each output channel of the key projection.

    Returns:
        New ``q_params`` and ``k_params``; the arguments are left alone.

    Raises:
        ValueError: if the channel counts differ.
    """
    signs = channel_signs(channel_mean)
    for name, params in (("query", q_params), ("key", k_params)):
        if params["kernel"].shape[-1:] != signs.shape:
            raise ValueError(
                f"channel_mean {signs.shape} must have one entry per output channel of the {name} projection "
                f"{tuple(params['kernel'].shape)}"
            )

    def flip(params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value * signs for name, value in params.items()}

    return flip(q_params), flip(k_params)


@partial(jax.jit, static_argnames=("sam", "pattern"))
@in_float32
def _keys_of(
    sam: Any, pattern: str, params: Params, embedding: PyTree[Float[Array, "..."]], boxes: Float[Array, "n 4"]
) -> dict[str, Float[Array, "n t c"]]:
    """Keys of the attentions that the pattern names, by their paths; their channels are those of k_proj."""
    captured: dict[str, jax.Array] = {}

    def capture(path: str, value: Any) -> Any:
        if path.endswith("/k") and re.fullmatch(pattern, path.removesuffix("/k")):
            # (N, heads, T, d) -> (N, T, heads*d): the channels of k_proj
            captured[path.removesuffix("/k")] = value.transpose(0, 2, 1, 3).reshape(len(value), value.shape[2], -1)
        return value

    with intercept_sites(capture):
        call(sam, params, embedding, None, boxes, method="decode")
    return captured


def unify_keys(
    architecture: Architecture,
    sam: Any,
    params: Params,
    embeddings: Sequence[PyTree[Shaped[np.ndarray, "..."]]],
    boxes: Sequence[Float32[np.ndarray, "p 4"]],
) -> tuple[Params, list[str]]:
    """BIG: flips the signs of bimodal keys and of their queries (paper section on BIG).

    Judged on the first calibration image with all its prompts (the official code: with its first); the signs of channel
    means come from all images.

    Args:
        architecture: the model's; its `bimodal` names the attentions that are looked at.
        sam: the module.
        params: its floating-point parameters.
        embeddings: the encoder's outputs for the calibration images.
        boxes: for each image its prompts, in canvas pixels.

    Returns:
        Equivalent parameters, and the attentions that were flipped.
    """
    if architecture.bimodal is None:
        return params, []
    decoder = architecture.decoder(params)
    first: dict[str, jax.Array] = {}
    means: dict[str, Any] = {}
    for embedding, prompts in zip(embeddings, boxes, strict=True):
        found = _keys_of(sam, architecture.bimodal, decoder, jax.tree.map(jnp.asarray, embedding), jnp.asarray(prompts))
        first = first or found
        for path, k in found.items():
            means[path] = means.get(path, 0.0) + np.asarray(k.mean((0, 1)))
    flat, flipped = flatten(params), []
    for path, k in first.items():
        if not is_bimodal(np.asarray(k)):
            continue
        q_path, k_path = f"{path}/q_proj/", f"{path}/k_proj/"
        q_new, k_new = flip_signs(below(q_path, flat), below(k_path, flat), means[path])
        flat |= {q_path + n: v for n, v in q_new.items()} | {k_path + n: v for n, v in k_new.items()}
        flipped.append(path)
    return unflatten(flat), flipped


def _apply(params: Params, context: Context) -> Params:
    return unify_keys(context.architecture, context.sam, params, context.embeddings, context.boxes)[0]


def _make(argument: str) -> Transform:
    takes_nothing("bimodal", argument)
    return Transform("bimodal", _apply, needs=("embeddings",))


register("bimodal", _make)
