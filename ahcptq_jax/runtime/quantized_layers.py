"""Layers on codes: what runs in place of a `Linear`, a `Conv` or an attention that is quantized.

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
from ahcptq_jax.runtime.products import Carrier
from sam_flax.layers import Conv, Linear, Site, conv_same

RecordCodes = Callable[[str, jax.Array], None]
# The method that reads the kernel.
_PRODUCT: dict[type, str] = {Linear: "product", Conv: "__call__"}


def intercept_quantized(
    weights: Mapping[str, QuantizedWeight],
    activations: Mapping[str, Quantizer],
    carrier: Carrier,
    record: RecordCodes | None,
) -> AbstractContextManager[None]:
    """Inside this context the quantized layers compute on codes.

    The modules' own kernels are not read where `weights` has one.

    Args:
        weights: layer path -> weight.
        activations: site path -> quantizer.
        carrier: of the sums, see `products`.
        record: called with the path of every quantized site and its codes; None where nobody asks.
    """

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, path, method = context.module, "/".join(context.module.path), context.method_name
        if path in weights and isinstance(module, Linear | Conv) and method == _PRODUCT[type(module)]:
            return _layer(path, weights[path], activations.get(f"{path}/input"), args[0], carrier, record)
        if method == "__call__" and (run := run_on_codes(module)) is not None:
            sites = {name: activations[f"{path}/{name}"] for name in ATTENTION_SITES if f"{path}/{name}" in activations}
            if products.supports_attention(sites):
                return run(module, _AttentionCodes(path, sites, carrier, record), *args)
        if isinstance(module, Site) and path in activations:
            return _fake_quant(path, activations[path], args[0], record)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def _encode(path: str, quantizer: Quantizer, x: jax.Array, record: RecordCodes | None) -> jax.Array:
    codes = quantizer.encode(x)
    if record:
        record(path, codes)
    return codes


def _fake_quant(path: str, quantizer: Quantizer, x: jax.Array, record: RecordCodes | None) -> jax.Array:
    return quantizer.decode(_encode(path, quantizer, x, record)).astype(x.dtype)


def _layer(
    path: str,
    weight: QuantizedWeight,
    quantizer: Quantizer | None,
    x: jax.Array,
    carrier: Carrier,
    record: RecordCodes | None,
) -> jax.Array:
    if quantizer is not None and products.supports_layer(quantizer, weight.shape):
        return products.layer(_encode(f"{path}/input", quantizer, x, record), quantizer, weight, carrier)
    if quantizer is not None:
        x = _fake_quant(f"{path}/input", quantizer, x, record)
    return x @ weight.decode() if len(weight.shape) == 2 else conv_same(x, weight.decode())


@dataclasses.dataclass(frozen=True)
class _AttentionCodes:
    """`architectures.base.AttentionCodes` for one attention."""

    path: str
    sites: Mapping[str, Quantizer]
    carrier: Carrier
    recorder: RecordCodes | None

    @property
    def recording(self) -> bool:
        return self.recorder is not None

    def encode(self, site: str, values: jax.Array) -> jax.Array:
        return _encode(f"{self.path}/{site}", self.sites[site], values, self.recorder)

    def decode(self, site: str, codes: jax.Array) -> jax.Array:
        return self.sites[site].decode(codes)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, *biases: jax.Array) -> tuple[jax.Array, jax.Array]:
        return products.attend(self.sites, q, k, v, biases, self.carrier)

    def record(self, site: str, codes: jax.Array) -> None:
        if self.recorder is not None:
            self.recorder(f"{self.path}/{site}", codes)
