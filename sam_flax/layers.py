"""Building blocks shared by encoder and decoder, and `Site`, the hook a quantizer needs."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


def in_float32(function: Function) -> Function:
    """The function with all matrix products in full float32, which GPUs and TPUs do not take by default."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            return function(*args, **kwargs)

    return cast(Function, wrapped)


class Site(nn.Module):
    """A named identity; quantization and calibration intercept its call by path."""

    def __call__(self, x: T) -> T:
        return x


@jax.custom_vjp
def project(x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]) -> Float[Array, "*batch out"]:
    """`x @ kernel`, with a gradient for which XLA on CPUs transposes little."""
    return x @ kernel


def _project_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _project_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    cotangent = jax.lax.optimization_barrier(cotangent)
    rows, out = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    narrow_input = x.shape[-1] <= cotangent.shape[-1]
    to_kernel = rows.T @ out if narrow_input else (out.T @ rows).T
    return cotangent @ kernel.T, to_kernel


project.defvjp(_project_forward, _project_backward)


class Linear(nn.Module):
    """`x @ kernel + bias` on the last axis, behind an input `Site`. kernel: (in, out)."""

    in_features: int
    features: int

    def setup(self) -> None:
        self.input = Site()
        self.kernel = self.param("kernel", nn.initializers.xavier_uniform(), (self.in_features, self.features))
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.product(x) + self.bias

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The layer without its bias."""
        return project(self.input(x), self.kernel)


class Conv(nn.Module):
    """Stride-1 'same' convolution without bias behind an input `Site`. kernel: (kh, kw, in, out)."""

    in_features: int
    features: int
    kernel_size: int

    def setup(self) -> None:
        self.input = Site()
        shape = (self.kernel_size, self.kernel_size, self.in_features, self.features)
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)

    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w out"]:
        return conv_same(self.input(x), self.kernel)


def conv_same(x: Float[Array, "b h w in"], kernel: Float[Array, "k k in out"]) -> Float[Array, "b h w out"]:
    """Stride-1 zero-padded convolution as one matrix product of shifted copies.

    On CPUs this is several times faster than `lax.conv_general_dilated`, in the gradient above all. `k` is odd.
    """
    k = kernel.shape[0]
    if k == 1:
        return x @ kernel[0, 0]
    return shifted_copies(x, k) @ kernel.reshape(-1, kernel.shape[-1])


def shifted_copies(
    x: Shaped[Array, "b h w c"], k: int, stride: int = 1, padding: int | None = None
) -> Shaped[Array, "b rows cols {k}*{k}*c"]:
    """`taps` side by side, as a kernel's rows meet them."""
    return jnp.concatenate(taps(x, k, stride, padding), axis=-1)


def taps(
    x: Shaped[Array, "b h w c"], k: int, stride: int = 1, padding: int | None = None
) -> list[Shaped[Array, "b rows cols c"]]:
    """The k x k neighbours of every pixel that a convolution stops at, zero outside, in the order of a kernel.

    Args:
        x: an image.
        k: side of the kernel.
        stride: pixels from one output to the next.
        padding: zeros on each side; None keeps the size at stride 1.
    """
    pad = k // 2 if padding is None else padding
    _, height, width, _ = x.shape
    # The last pixel that a copy takes is the first of its last step.
    tall, wide = (stride * ((side + 2 * pad - k) // stride) + 1 for side in (height, width))
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return [padded[:, i : i + tall : stride, j : j + wide : stride] for i in range(k) for j in range(k)]


class PatchConv(nn.Module):
    """Convolution whose stride is its kernel size: a matrix product on patches. kernel: (p, p, in, out)."""

    in_features: int
    features: int
    patch_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h//{self.patch_size} w//{self.patch_size} out"]:
        p = self.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, self.in_features, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        b, h, w, c = x.shape
        patches = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(b, h // p, w // p, p * p * c) @ kernel.reshape(-1, self.features) + bias


class UpConv(nn.Module):
    """Transposed convolution, kernel 2, stride 2: each pixel becomes a 2x2 patch. kernel: (2, 2, in, out)."""

    in_features: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b 2*h 2*w out"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, self.in_features, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        b, h, w, c = x.shape
        flat = kernel.transpose(2, 0, 1, 3).reshape(c, 4 * self.features)
        up = (x @ flat).reshape(b, h, w, 2, 2, self.features) + bias
        return up.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.features)


def layer_norm(eps: float = 1e-6) -> nn.LayerNorm:
    """LayerNorm over channels; SAM's LayerNorm2d is the same thing when channels come last."""
    # The fast variance E[x^2]-E[x]^2 loses digits where the mean is large, as in SAM's residual stream.
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact (erf) GELU, as SAM was trained with."""
    return nn.gelu(x, approximate=False)


class MLPBlock(nn.Module):
    """Two linears around an activation (modeling/common.py MLPBlock)."""

    embedding_dim: int
    mlp_dim: int
    act: Callable[[Array], Array] = gelu

    def setup(self) -> None:
        self.lin1 = Linear(self.embedding_dim, self.mlp_dim)
        self.lin2 = Linear(self.mlp_dim, self.embedding_dim)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return self.lin2(self.act(self.lin1(x)))


class MLP(nn.Module):
    """`num_layers` linears with ReLU between (modeling/mask_decoder.py MLP); left in floating point."""

    input_dim: int
    hidden_dim: int
    output_dim: int
    num_layers: int

    def setup(self) -> None:
        dims = [self.input_dim] + [self.hidden_dim] * (self.num_layers - 1) + [self.output_dim]
        self.layers = [Linear(i, o) for i, o in zip(dims[:-1], dims[1:], strict=True)]

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)
