"""Integer inference: every quantized linear and attention product computed on codes, as an accelerator would.

The value of an activation is split into planes, `x = minimum + sum_p factor_p * (operand_p - zero_point_p)`, whose
operands are non-negative integers; against weight codes `q` with zero points `z` and scales `s`,

    y[n] = s[n] * sum_p factor_p * A_p[n] + bias[n],
    A_p[n] = sum_k operand q[k, n] - z[n] sum_k operand - zero_point_p (sum_k q[k, n] - K z[n]).

Every `A_p` is one int32 accumulator: the sums over weights alone are taken offline, `minimum * s * sum_k (q - z)` is
folded into the bias, and floating point appears only at the rescale. The planes of each kind of quantizer:

| quantizer | planes | operand | factor |
|---|---|---|---|
| uniform | 1 | code | scale |
| grouped (CAG) | one a group; channels permuted offline so that each is contiguous | code | the group's scale |
| hybrid (HLUQ) | log: 1 (more above 4 bits, see below) | `1 << (top - k)`; uniform codes are k = 0 | `s_l 2^-top` |
| | uniform: 1 | n | `s_u` |
| log2 (AGQ) | one for each `r = k mod tau` | `1 << (top - k div tau)` | `s 2^(-r/tau) 2^-top` |

An operand that is a power of two makes a shift of the multiplication by it: the sums are `sum w << (top - k)`, and
a zero code adds nothing. Where all shifts of a plane would not fit in 32 bits the octaves are divided among several
accumulators (`octaves`), so no accumulator can overflow, whatever the codes; `accumulators` lists the widths.

Widths of the intermediates in bits, for weights of w bits, activations of a bits and K terms:

| intermediate | width | SAM-H, W4A4 |
|---|---|---|
| activation and weight code | a, w | 4, 4 |
| shifted weight | w + octaves - 1 | HLUQ 11, AGQ 18 |
| product, uniform and grouped | a + w | 8 |
| row sum of operands | a + log2 K | 17 |
| accumulator, uniform and grouped | a + w + log2 K + 2 | 20 (K = 1280) |
| accumulator, 3x3 convolution | the same | 21 (K = 2304) |
| accumulator, q k | the same | 16 (K = 80) |
| accumulator, HLUQ log part | w + octaves + log2 K + 1, at most 32 | 25 (K = 5120) |
| accumulator, HLUQ uniform part | a + w + log2 K + 1 | 21 |
| accumulator, AGQ softmax x v | w + octaves + log2 N + 1, at most 32 | 31 (N = 4096 keys) |
| rescale, bias, softmax, norms, residual | float32 | 32 |

Against the fake-quantized path (`Quantized`) the codes of equal inputs are equal and each layer's output agrees to
float32 rounding (1e-5 of its largest value); `compare_stage` measures both.

Sources: paper, sections on HLUQ and CAG; PTQ4SAM, section on AGQ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ahcptq_jax.integer_core import Coder, IntegerLayer, attend
from ahcptq_jax.integer_core import accumulators as accumulators
from ahcptq_jax.quantized import Quantized, QuantizedWeight, with_decoded
from ahcptq_jax.quantizers import Quantizer, Uniform
from ahcptq_jax.sites import below, flatten, unflatten
from sam_flax import image_encoder, mask_decoder
from sam_flax.config import SamConfig
from sam_flax.layers import Site
from sam_flax.sam import Params, Points, Sam, apply_embed, call, check_canvas, encoder_stages


def _fits_whole(q: jax.Array, k: jax.Array) -> bool:
    return len(q) * q.shape[-2] * k.shape[-2] * 4 <= image_encoder.MAX_ATTENTION_BYTES


def _attend_bounded(
    coders: Mapping[str, Coder], q: jax.Array, k: jax.Array, v: jax.Array, *biases: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """`attend` on (G, N, d) in bounded memory, like `image_encoder.attention`; then without the codes."""
    if _fits_whole(q, k):
        return attend(coders, q, k, v, biases)
    n = q.shape[1]
    chunk = image_encoder.QUERY_CHUNK if n % image_encoder.QUERY_CHUNK == 0 else n

    def one_head(head: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, *biases = head
        chunks = [a.reshape(n // chunk, chunk, a.shape[-1]) for a in (q, *biases)]
        return jax.lax.map(lambda c: attend(coders, c[0], k, v, tuple(c[1:]))[0], chunks).reshape(n, -1)

    return jax.lax.map(one_head, (q, k, v, *biases)), None


Note = Callable[[str, jax.Array], None]


def _attention_of_encoder(
    module: image_encoder.Attention, coders: Mapping[str, Coder], note: Note, x: jax.Array
) -> jax.Array:
    """`image_encoder.Attention.__call__` with both products on codes."""
    b, h, w, _ = x.shape
    heads, n = module.num_heads, h * w
    qkv = module.qkv(x).reshape(b, n, 3, heads, -1).transpose(2, 0, 3, 1, 4).reshape(3, b * heads, n, -1)
    q, k, v = (_encode(coders, name, a, note) for name, a in zip("qkv", qkv, strict=True))
    q_grid = coders["q"].quantizer.decode(q).reshape(b * heads, h, w, -1)
    bias_h = jnp.einsum("ghwc,hkc->ghwk", q_grid, image_encoder.relative_positions(module.rel_pos_h, h))
    bias_w = jnp.einsum("ghwc,wkc->ghwk", q_grid, image_encoder.relative_positions(module.rel_pos_w, w))
    biases = bias_h.reshape(b * heads, n, h), bias_w.reshape(b * heads, n, w)
    out, codes = _attend_bounded(coders, q, k, v, *biases)
    if codes is not None:
        note("softmax", codes)
    return module.proj(out.reshape(b, heads, n, -1).transpose(0, 2, 1, 3).reshape(b, h, w, module.dim))


def _attention_of_decoder(
    module: mask_decoder.Attention, coders: Mapping[str, Coder], note: Note, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """`mask_decoder.Attention.__call__` with both products on codes."""
    projected = module.q_proj(q), module.k_proj(k), module.v_proj(v)
    separate = module._separate_heads
    q, k, v = (_encode(coders, name, separate(a), note) for name, a in zip("qkv", projected, strict=True))
    out, codes = attend(coders, q, k, v)
    note("softmax", codes)
    return module.out_proj(out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1))


def _encode(coders: Mapping[str, Coder], name: str, x: jax.Array, note: Note) -> jax.Array:
    codes = coders[name].quantizer.encode(x)
    note(name, codes)
    return codes


def _intercept(
    layers: Mapping[str, IntegerLayer], coders: Mapping[str, Coder], note: Note
) -> AbstractContextManager[None]:
    """Inside this context the layers and attentions named compute on integers; `note` sees the codes of each site."""

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if path in layers:
            y, codes = layers[path](*args)
            note(f"{path}/input", codes)
            return y
        if f"{path}/softmax" in coders:
            own = below(f"{path}/", coders)
            if isinstance(module, image_encoder.Attention):
                return _attention_of_encoder(module, own, lambda site, codes: note(f"{path}/{site}", codes), *args)
            return _attention_of_decoder(module, own, lambda site, codes: note(f"{path}/{site}", codes), *args)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def _with_placeholders(params: Params, layers: Mapping[str, IntegerLayer]) -> Params:
    """Parameters with kernels that nothing reads, which the modules declare all the same."""
    return unflatten(flatten(params) | {f"{k}/kernel": jnp.zeros(v.kernel_shape) for k, v in layers.items()})


@functools.partial(jax.jit, static_argnames=("module", "method", "multimask", "record"))
def _apply(
    module: Any,
    params: Params,
    layers: dict[str, IntegerLayer],
    coders: dict[str, Coder],
    inputs: tuple,
    *,
    method: str | None = None,
    multimask: tuple[bool, ...] = (),
    record: bool = False,
) -> tuple[Any, dict[str, jax.Array]]:
    codes: dict[str, jax.Array] = {}
    note: Note = codes.__setitem__ if record else lambda path, value: None
    with _intercept(layers, coders, note):
        output = call(module, _with_placeholders(params, layers), *inputs, *multimask, method=method)
    return output, codes


class IntegerModel:
    """A quantized SAM on integer arithmetic, usable wherever `SamPredictor` takes a model.

    Args:
        quantized: the model; all inputs of its quantized layers and all four sites of an attention must be quantized.

    Raises:
        ValueError: if a quantizer has no integer form.
    """

    def __init__(self, quantized: Quantized):
        flat, activations = flatten(quantized.params), quantized.activations
        self.sam: Sam = quantized.sam
        self.params = quantized.params
        self.layers = {
            path: IntegerLayer.prepare(path, weight, flat.get(f"{path}/bias", 0.0), activations.get(f"{path}/input"))
            for path, weight in quantized.weights.items()
        }
        self.coders: dict[str, Coder] = {}
        for site, quantizer in activations.items():
            parent, _, name = site.rpartition("/")
            if name == "input" and parent in self.layers:
                continue
            missing = [f"{parent}/{n}" for n in ("q", "k", "v", "softmax") if f"{parent}/{n}" not in activations]
            if name == "input" or missing or (name in "qkv" and not isinstance(quantizer, Uniform)):
                raise ValueError(
                    f"Site {site} is quantized in a way that has no integer product; use Quantized itself."
                )
            self.coders[site] = Coder.prepare(site, quantizer)

    @property
    def config(self) -> SamConfig:
        """The model's configuration."""
        return self.sam.config

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Images (B, S, S, 3), normalised and padded -> embeddings (B, g, g, C)."""
        return self.encode_with_codes(images, record=False)[0]

    def encode_with_codes(self, images: jax.Array, record: bool = True) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`encode_image`, and the codes at every site that is held whole."""
        check_canvas(images, self.config)
        encoder = self.params["image_encoder"]
        embed = image_encoder.PatchEmbed(self.config.patch_size, self.config.embed_dim, parent=None)
        x = apply_embed(embed, {k: encoder[k] for k in ("patch_embed", "pos_embed")}, images)
        found: dict[str, jax.Array] = {}
        for key, module in encoder_stages(self.config):
            prefix = f"image_encoder/{key}/"
            layers, coders = below(prefix, self.layers), below(prefix, self.coders)
            x, codes = _apply(module, encoder.get(key, {}), layers, coders, (x,), record=record)
            found |= {prefix + site: value for site, value in codes.items()}
        return x, found

    def decode(
        self,
        image_embeddings: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """See `sam_flax.Sam.decode`."""
        return self.decode_with_codes(image_embeddings, points, boxes, masks, multimask_output, record=False)[0]

    def decode_with_codes(
        self,
        image_embeddings: jax.Array,
        points: Points | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        multimask_output: bool = True,
        record: bool = True,
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
        """`decode`, and the codes at every site."""
        params = {k: self.params[k] for k in ("prompt_encoder", "mask_decoder")}
        parts = ({k: v for k, v in d.items() if k.startswith("mask_decoder/")} for d in (self.layers, self.coders))
        inputs = (image_embeddings, points, boxes, masks)
        return _apply(self.sam, params, *parts, inputs, method="decode", multimask=(multimask_output,), record=record)


class Difference(NamedTuple):
    """How far the integer path is from the fake-quantized one on equal inputs; arrays are scalars.

    Attributes:
        outputs: path of a layer or attention -> largest difference of its output, relative to its largest value.
        codes: site -> (codes that differ, codes).
    """

    outputs: dict[str, jax.Array]
    codes: dict[str, tuple[jax.Array, int]]


@functools.partial(jax.jit, static_argnames=("module", "method", "multimask"))
def _compare(
    module: Any,
    params: Params,
    weights: dict[str, QuantizedWeight],
    activations: dict[str, Quantizer],
    layers: dict[str, IntegerLayer],
    coders: dict[str, Coder],
    inputs: tuple,
    *,
    method: str | None = None,
    multimask: tuple[bool, ...] = (),
) -> tuple[Any, Difference]:
    """Runs a part of the model fake-quantized, and beside it each layer and attention on integers."""
    seen: dict[str, Any] = {}
    outputs: dict[str, jax.Array] = {}

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        if isinstance(context.module, Site):
            seen[path] = args[0]
            return activations[path].fake_quant(args[0]) if path in activations else args[0]
        y = next_fun(*args, **kwargs)
        if path in layers and context.method_name == "__call__":
            outputs[path] = y
        return y

    with nn.intercept_methods(interceptor):
        result = call(module, with_decoded(params, weights), *inputs, *multimask, method=method)

    errors, codes = {}, {}
    for path, layer in layers.items():
        site = f"{path}/input"
        y, found = layer(seen[site])
        errors[path] = _relative(y, outputs[path])
        codes[site] = (jnp.sum(found != activations[site].encode(seen[site])), found.size)
    for path in {site.rpartition("/")[0] for site in coders}:
        own = below(f"{path}/", coders)
        q, k, v = (own[name].quantizer.encode(seen[f"{path}/{name}"]) for name in "qkv")
        out, found_or_none = _attend_bounded(own, q, k, v, *seen[f"{path}/operands"][3:])
        merged = seen[f"{path}/proj/input"] if f"{path}/proj/input" in seen else seen[f"{path}/out_proj/input"]
        # Heads are next to the channels in `merged` and next to the batch in `out`.
        heads = merged.shape[-1] // out.shape[-1]
        out = jnp.moveaxis(out.reshape(merged.shape[0], heads, -1, out.shape[-1]), 1, 2).reshape(merged.shape)
        errors[path] = _relative(out, merged)
        if found_or_none is not None:
            expected = activations[f"{path}/softmax"].encode(seen[f"{path}/softmax"])
            codes[f"{path}/softmax"] = (jnp.sum(found_or_none != expected), expected.size)
    return result, Difference(errors, codes)


def _relative(x: jax.Array, reference: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x - reference)) / jnp.max(jnp.abs(reference))


def compare(
    quantized: Quantized, model: IntegerModel, images: jax.Array, points: Points | None, boxes: jax.Array | None
) -> Difference:
    """Every layer and attention of both paths on equal inputs: those of the fake-quantized path.

    Args:
        quantized: the fake-quantized model.
        model: its integer form.
        images: (1, S, S, 3), normalised and padded.
        points, boxes: prompts as for `decode`; either may be None.
    """
    encoder = quantized.params["image_encoder"]
    embed = image_encoder.PatchEmbed(quantized.config.patch_size, quantized.config.embed_dim, parent=None)
    x = apply_embed(embed, {k: encoder[k] for k in ("patch_embed", "pos_embed")}, images)
    total = Difference({}, {})

    def run(module: Any, params: Params, prefix: str, cut: str, inputs: tuple, **static: Any) -> Any:
        entries = (quantized.weights, quantized.activations, model.layers, model.coders)
        parts = [
            {path.removeprefix(cut): value for path, value in group.items() if path.startswith(prefix)}
            for group in entries
        ]
        result, found = _compare(module, params, *parts, inputs, **static)
        total.outputs.update({cut + path: value for path, value in found.outputs.items()})
        total.codes.update({cut + path: value for path, value in found.codes.items()})
        return result

    for key, module in encoder_stages(quantized.config):
        prefix = f"image_encoder/{key}/"
        x = run(module, encoder.get(key, {}), prefix, prefix, (x,))
    params = {k: quantized.params[k] for k in ("prompt_encoder", "mask_decoder")}
    run(quantized.sam, params, "mask_decoder/", "", (x, points, boxes, None), method="decode", multimask=(True,))
    return total
