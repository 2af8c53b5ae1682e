"""SAM's layers on codes: what runs in place of a `Linear`, `Conv` or attention that is quantized."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.runtime import products
from ahcptq_jax.runtime.products import ATTENTION_SITES, Carrier
from sam_flax.encoders import vit
from sam_flax.heads import mask_decoder
from sam_flax.layers import Conv, Linear, Site, conv_same

if TYPE_CHECKING:
    from ahcptq_jax.runtime.quantized import QuantizedWeight

Note = Callable[[str, jax.Array], None]
# The method that reads the kernel.
_PRODUCT: dict[type, str] = {Linear: "product", Conv: "__call__"}


def intercept_quantized(
    weights: Mapping[str, "QuantizedWeight"], activations: Mapping[str, Quantizer], carrier: Carrier, note: Note | None
) -> AbstractContextManager[None]:
    """Inside this context the quantized layers compute on codes.

    The modules' own kernels are not read where `weights` has one.

    Args:
        weights: layer path -> weight.
        activations: site path -> quantizer.
        carrier: of the sums, see `products`.
        note: called with the path of every quantized site and its codes; None where nobody asks.
    """

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, path, method = context.module, "/".join(context.module.path), context.method_name
        if path in weights and isinstance(module, Linear | Conv) and method == _PRODUCT[type(module)]:
            return _layer(path, weights[path], activations.get(f"{path}/input"), args[0], carrier, note)
        if method == "__call__" and isinstance(module, vit.Attention | mask_decoder.Attention):
            sites = {name: activations[f"{path}/{name}"] for name in ATTENTION_SITES if f"{path}/{name}" in activations}
            if products.supports_attention(sites) and isinstance(module, vit.Attention):
                return _encoder_attention(module, path, sites, carrier, note, *args)
            if products.supports_attention(sites) and isinstance(module, mask_decoder.Attention):
                return _decoder_attention(module, path, sites, carrier, note, *args)
        if isinstance(module, Site) and path in activations:
            return _fake_quant(path, activations[path], args[0], note)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def _encode(path: str, quantizer: Quantizer, x: jax.Array, note: Note | None) -> jax.Array:
    codes = quantizer.encode(x)
    if note:
        note(path, codes)
    return codes


def _fake_quant(path: str, quantizer: Quantizer, x: jax.Array, note: Note | None) -> jax.Array:
    return quantizer.decode(_encode(path, quantizer, x, note)).astype(x.dtype)


def _layer(
    path: str,
    weight: "QuantizedWeight",
    quantizer: Quantizer | None,
    x: jax.Array,
    carrier: Carrier,
    note: Note | None,
) -> jax.Array:
    if quantizer is not None and products.supports_layer(quantizer, weight.shape):
        return products.layer(_encode(f"{path}/input", quantizer, x, note), quantizer, weight, carrier)
    if quantizer is not None:
        x = _fake_quant(f"{path}/input", quantizer, x, note)
    return x @ weight.decode() if len(weight.shape) == 2 else conv_same(x, weight.decode())


def _encoder_attention(
    module: vit.Attention,
    path: str,
    sites: Mapping[str, Quantizer],
    carrier: Carrier,
    note: Note | None,
    x: jax.Array,
) -> jax.Array:
    """`vit.Attention.__call__` on codes."""
    grid = (x.shape[1], x.shape[2])
    h, w = (module.size, module.size) if module.windowed else grid
    values = vit.split_heads(module.qkv.product(x), module.qkv.bias, (h, w), module.num_heads)
    q, k, v = (_encode(f"{path}/{name}", sites[name], a, note) for name, a in zip("qkv", values, strict=True))

    def attend(part: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, k, v, *biases = part
        out, codes = products.attend(sites, q, k, v, tuple(biases), carrier)
        # One byte each: all maps of a block together can be large.
        return (out, codes.astype(jnp.uint8)) if note else (out,)

    biases = vit.relative_biases(sites["q"].decode(q), module.rel_pos_h, module.rel_pos_w, (h, w))
    out, *codes = vit.attend_in_parts(attend, q, k, v, *biases)
    if note:
        note(f"{path}/softmax", codes[0])
    out = out.reshape(-1, module.num_heads, h, w, out.shape[-1]).transpose(0, 2, 3, 1, 4)
    return module.proj(vit.window_unpartition(out.reshape(-1, h, w, module.dim), grid))


def _decoder_attention(
    module: mask_decoder.Attention,
    path: str,
    sites: Mapping[str, Quantizer],
    carrier: Carrier,
    note: Note | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """`mask_decoder.Attention.__call__` on codes."""
    separate = module.separate_heads
    values = separate(module.q_proj(q)), separate(module.k_proj(k)), separate(module.v_proj(v))
    q, k, v = (_encode(f"{path}/{name}", sites[name], a, note) for name, a in zip("qkv", values, strict=True))
    out, codes = products.attend(sites, q, k, v, (), carrier)
    if note:
        note(f"{path}/softmax", codes)
    return module.out_proj(out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1))
