"""CAG's ladder while scales are learned: the channels of a unit's quantizers in ever fewer groups."""

import dataclasses

import jax
import jax.numpy as jnp

from ahcptq_jax.quantizers.kinds import kind_of
from ahcptq_jax.reconstruction.learning import State


def regroup(state: State, groups: int, final: int, metric: str) -> State:
    """One rung of CAG's ladder: the channels of every quantizer with groups into `groups`, moments included.

    Args:
        final: groups at the end of the ladder.
        metric: of the k-means, see `grouping.group_channels`.
    """
    quantizers = dict(state.quantizers)
    adam, *rest = state.scale_moments
    for path, quantizer in state.quantizers.items():
        own = kind_of(quantizer).channel_groups
        if own is None or groups >= own.labels(quantizer).shape[0]:
            continue
        quantizers[path] = merged = own.merged(quantizer, groups, final, metric)
        if path in adam.mu:
            pairs = {
                name: _map_moments(mean, adam.nu[path][name], own.labels(quantizer), own.labels(merged))
                for name, mean in adam.mu[path].items()
            }
            adam = adam._replace(
                mu=adam.mu | {path: {name: mean for name, (mean, _) in pairs.items()}},
                nu=adam.nu | {path: {name: square for name, (_, square) in pairs.items()}},
            )
    return dataclasses.replace(state, quantizers=quantizers, scale_moments=(adam, *rest))


@jax.jit
def _map_moments(mu: jax.Array, nu: jax.Array, old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adam's moments (C,) of groups labelled `old` (C,), for the groups `new` (C,) that they were merged into.

    The gradient of a merged scale is the sum of those it replaces, and so is its mean. Its root mean square is at most
    the sum of theirs; that bound is taken, so that no step grows by merging.
    """
    share = 1.0 / jnp.zeros_like(mu).at[old].add(1.0)[old]  # each old group counts once, over its channels
    merged = jnp.zeros_like(mu).at[new].add(mu[old] * share)
    root = jnp.zeros_like(nu).at[new].add(jnp.sqrt(nu[old]) * share)
    return merged, jnp.square(root)
