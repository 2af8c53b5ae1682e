"""Layers on levels: what runs in place of a `Linear`, a `Conv` or an attention that is quantized.

How an attention module calls its two products is its architecture's affair: `Architecture.attentions`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax

from ahcptq_jax.architectures.base import ATTENTION_SITES, run_on_codes
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.runtime import products
from ahcptq_jax.runtime.products import Carrier, GridSite
from sam_flax.convolutions import DepthwiseConv, StridedConv, conv_depthwise, conv_strided
from sam_flax.layers import Conv, Linear, Site, conv_same

RecordCodes = Callable[[str, jax.Array], None]
# The method that reads the kernel.
_PRODUCT: dict[type, str] = {
    Linear: "product",
    Conv: "__call__",
    StridedConv: "__call__",
    DepthwiseConv: "__call__",
}


def intercept_quantized(
    weights: Mapping[str, QuantizedWeight],
    activations: Mapping[str, Quantizer],
    grid_bits: int,
    carrier: Carrier,
    record: RecordCodes | None,
) -> AbstractContextManager[None]:
    """Inside this context the quantized layers compute on levels, or on decoded values where there are none.

    The modules' own kernels are not read where `weights` has one.

    Args:
        weights: layer path -> weight.
        activations: site path -> quantizer.
        grid_bits: of the grid that the quantizers are on; 0 for none.
        carrier: of the sums, see `products`.
        record: called with the path of every quantized site and its codes; None where nobody asks.
    """

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, path, method = context.module, "/".join(context.module.path), context.method_name
        if path in weights and method == _PRODUCT.get(type(module)):
            quantizer = activations.get(f"{path}/input")
            return _layer(module, path, weights[path], quantizer, args[0], grid_bits, carrier, record)
        if method == "__call__" and (run := run_on_codes(module)) is not None:
            own = {name: activations[f"{path}/{name}"] for name in ATTENTION_SITES if f"{path}/{name}" in activations}
            if (sites := products.attention_sites(own, grid_bits)) is not None:
                return run(module, _AttentionCodes(path, sites, carrier, record), *args)
        if isinstance(module, Site) and path in activations:
            return _fake_quant(path, activations[path], args[0], record)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def _fake_quant(path: str, quantizer: Quantizer, x: jax.Array, record: RecordCodes | None) -> jax.Array:
    codes = quantizer.encode(x)
    if record:
        record(path, codes)
    return quantizer.decode(codes).astype(x.dtype)


def _layer(
    module: nn.Module,
    path: str,
    weight: QuantizedWeight,
    quantizer: Quantizer | None,
    x: jax.Array,
    grid_bits: int,
    carrier: Carrier,
    record: RecordCodes | None,
) -> jax.Array:
    site = products.on_grid(quantizer, grid_bits)
    if site is not None and products.supports_layer(site, weight.shape):
        level, codes = site.encode(x)
        if record:
            record(f"{path}/input", codes)
        if isinstance(module, DepthwiseConv):
            return products.depthwise(level, site, weight, carrier, module.stride)
        if isinstance(module, StridedConv):
            return products.layer(level, site, weight, carrier, module.stride, module.padding)
        return products.layer(level, site, weight, carrier)
    if quantizer is not None:
        x = _fake_quant(f"{path}/input", quantizer, x, record)
    if isinstance(module, DepthwiseConv):
        return conv_depthwise(x, weight.decode(), module.stride)
    if isinstance(module, StridedConv):
        return conv_strided(x, weight.decode(), module.stride, module.padding)
    return x @ weight.decode() if isinstance(module, Linear) else conv_same(x, weight.decode())


@dataclasses.dataclass(frozen=True)
class _AttentionCodes:
    """`architectures.base.AttentionCodes` for one attention."""

    path: str
    sites: Mapping[str, GridSite]
    carrier: Carrier
    recorder: RecordCodes | None

    @property
    def recording(self) -> bool:
        return self.recorder is not None

    def encode(self, site: str, values: jax.Array) -> jax.Array:
        level, codes = self.sites[site].encode(values)
        self.record(site, codes)
        return level

    def decode(self, site: str, level: jax.Array) -> jax.Array:
        return self.sites[site].decode(level)

    def across(self, k: jax.Array) -> jax.Array:
        return products.across(self.sites["k"], k)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, *biases: jax.Array) -> tuple[jax.Array, jax.Array]:
        return products.attend(self.sites, q, k, v, biases, self.carrier)

    def record(self, site: str, codes: jax.Array) -> None:
        if self.recorder is not None:
            self.recorder(f"{self.path}/{site}", codes)
