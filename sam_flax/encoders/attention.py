"""Softmax attention in bounded memory, with an optional table of biases; what TinyViT and Hiera attend with."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sam_flax.encoders.vit import CPU_PART_BYTES, CPU_WHOLE_BYTES, MAX_ATTENTION_BYTES, QUERY_CHUNK


def attention_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The softmax over keys before its division.

    Args:
        q: (..., M, d) queries, already scaled.
        k: (..., N, d).
        bias: added to the scores, or None.

    Returns:
        weights (..., M, N), and what to divide them by, (..., M, 1).
    """
    scores = q @ jnp.swapaxes(k, -1, -2)
    if bias is not None:
        scores = scores + bias
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def attention_probabilities(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Softmax over the keys, for any subset of queries; shapes as in `attention_weights`."""
    weights, total = attention_weights(q, k, bias)
    return weights / total


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    softmax_site: Callable[[jax.Array], jax.Array],
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in bounded memory.

    Args:
        q: (G, heads, M, d) queries, already scaled; G counts images and windows.
        k: (G, heads, N, d).
        v: (G, heads, N, d).
        softmax_site: called on attention probabilities (..., N); where it gives back the very array that it was
            given, values are weighted first and divided after.
        bias: (heads, M, N), the same in every window, or None.

    Returns:
        (G, heads, M, d).
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        weights, total = attention_weights(q, k, bias)
        probabilities = weights / total
        seen = softmax_site(probabilities)
        if seen is probabilities:  # as they were: to divide the few products is less work
            return (weights @ v) / total
        return seen @ v

    return attend_in_parts(attend, q, k, v, split_queries=bias is None)


def attend_in_parts(
    attend: Callable[[jax.Array, jax.Array, jax.Array], Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    split_queries: bool,
) -> Any:
    """`attend` on all windows, in parts where their attention maps together would be large.

    Args:
        attend: some windows' operands to arrays (windows, heads, M, any); with `split_queries` also called on some of
            the heads, and on some of their queries.
        q, k, v: as in `attention`; int8 levels in their place may have the keys as (G, heads, d, N).
        split_queries: whether heads and queries may be parted where one window alone is large.

    Returns:
        What `attend` returns on everything.
    """
    groups, heads, m, _ = q.shape
    # The map of levels is one of float32.
    one_map = m * v.shape[2] * (4 if jnp.issubdtype(q.dtype, jnp.integer) else q.dtype.itemsize)
    on_cpu = jax.default_backend() == "cpu"
    whole, part = (CPU_WHOLE_BYTES, CPU_PART_BYTES) if on_cpu else (MAX_ATTENTION_BYTES, MAX_ATTENTION_BYTES)
    if groups * heads * one_map <= whole:
        return attend(q, k, v)
    # A gradient, too, holds a part at a time of what would be large.
    attend_part = attend if groups * heads * one_map <= MAX_ATTENTION_BYTES else jax.checkpoint(attend)
    if not split_queries or heads * one_map <= part:
        return _mapped(attend_part, (q, k, v), _divisor(groups, part // (heads * one_map)))
    # One head of one window at a time, or several heads where their maps are small.
    by_head = tuple(a.reshape(groups * heads, 1, *a.shape[2:]) for a in (q, k, v))
    if one_map <= part:
        out = _mapped(attend_part, by_head, _divisor(groups * heads, part // one_map))
    else:
        chunk = QUERY_CHUNK if m % QUERY_CHUNK == 0 else m

        def one_head(operands: tuple[jax.Array, ...]) -> Any:
            q, k, v = operands  # (1, M, d), (1, N, d)
            chunks = q.reshape(m // chunk, 1, 1, chunk, q.shape[-1])
            out = jax.lax.map(lambda part: attend_part(part, k[None], v[None]), chunks)
            return jax.tree.map(lambda a: a.reshape(1, m, -1), out)

        out = jax.lax.map(one_head, by_head)
    return jax.tree.map(lambda a: a.reshape(groups, heads, m, -1), out)


def _divisor(count: int, at_most: int) -> int:
    """The largest divisor of a number that is not above a bound, and at least 1."""
    return max(d for d in range(1, count + 1) if count % d == 0 and (d == 1 or d <= at_most))


def _mapped(attend: Callable[..., Any], operands: Sequence[jax.Array], together: int) -> Any:
    """`attend` on `together` of the leading axis at a time."""
    groups = operands[0].shape[0]
    parts = tuple(a.reshape(groups // together, together, *a.shape[1:]) for a in operands)
    out = jax.lax.map(lambda part: attend(*part), parts)
    return jax.tree.map(lambda a: a.reshape(groups, *a.shape[2:]), out)
