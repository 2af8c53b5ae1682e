"""Strided and depthwise convolutions, and what is left of batch norm when a model is used."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam_flax.layers import Conv, Site, taps

Params = dict[str, Any]  # nested, arrays at the leaves


class StridedConv(nn.Module):
    """A zero-padded convolution without bias behind an input `Site`. kernel: (k, k, in, out)."""

    in_features: int
    features: int
    kernel_size: int
    stride: int
    padding: int

    def setup(self) -> None:
        self.input = Site()
        shape = (self.kernel_size, self.kernel_size, self.in_features, self.features)
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, H, W, in) -> (B, H', W', out)
        return conv_strided(self.input(x), self.kernel, self.stride, self.padding)


class DepthwiseConv(nn.Module):
    """A zero-padded convolution of every channel by itself, without bias, behind an input `Site`. kernel: (k, k, 1, C).

    The padding keeps the size at stride 1 and halves it, rounded up, at stride 2.
    """

    features: int
    kernel_size: int
    stride: int = 1

    def setup(self) -> None:
        self.input = Site()
        shape = (self.kernel_size, self.kernel_size, 1, self.features)
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, H, W, C) -> (B, H', W', C)
        return conv_depthwise(self.input(x), self.kernel, self.stride)


def conv_strided(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution with `padding` zeros on each side: (B, H, W, in), (k, k, in, out) -> (B, H', W', out)."""
    # On CPUs XLA's convolution is four to ten times faster here than a product of shifted copies (3 to 96 channels).
    sides = ((padding, padding), (padding, padding))
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), sides, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv_depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution of every channel by itself, as a sum of shifted copies.

    On CPUs this is five times faster than XLA's grouped convolution (256 x 256 pixels, 256 channels).

    Args:
        x: (B, H, W, C).
        kernel: (k, k, 1, C), k odd; k // 2 zeros stand on each side.
        stride: pixels from one output to the next.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C).
    """
    rows = kernel.reshape(-1, kernel.shape[-1])
    total = jnp.zeros((), x.dtype)
    for row, copy in zip(rows, taps(x, kernel.shape[0], stride), strict=True):
        total = total + copy * row
    return total


class ChannelAffine(nn.Module):
    """`x * scale + bias` per channel: a batch norm with the statistics it was trained to, see `folded`."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (..., C) -> (..., C)
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        return x * scale + self.param("bias", nn.initializers.zeros, (self.features,))


class ConvNorm(nn.Module):
    """A convolution, of every channel by itself if `depthwise`, and its batch norm."""

    in_features: int
    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False

    def setup(self) -> None:
        k = self.kernel_size
        self.conv: nn.Module
        if self.depthwise:
            self.conv = DepthwiseConv(self.features, k, self.stride)
        elif self.stride == 1:
            self.conv = Conv(self.in_features, self.features, k)
        else:
            self.conv = StridedConv(self.in_features, self.features, k, self.stride, k // 2)
        self.norm = ChannelAffine(self.features)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, H, W, in) -> (B, H', W', features)
        return self.norm(self.conv(x))


def folded(params: Params) -> Params:
    """The same function with every batch norm's scale in the kernel before it, and ones in its place.

    Every output channel of a kernel is multiplied by the scale of that channel; the bias stays where it is.

    Args:
        params: nested parameters of any model; convolutions without a batch norm, and all others, stay as they are.
    """

    def walk(tree: Mapping[str, Any]) -> Params:
        result = {key: walk(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
        if result.keys() == {"conv", "norm"} and result["norm"].keys() == {"scale", "bias"}:
            scale = result["norm"]["scale"]
            result["conv"] = {"kernel": result["conv"]["kernel"] * scale}
            result["norm"] = {"scale": jnp.ones_like(scale), "bias": result["norm"]["bias"]}
        return result

    return walk(params)
