"""The iterations of one unit: the draws of its batches, the regrouping of channels, and the saving of its state."""

import dataclasses
import time
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ahcptq_jax import devices
from ahcptq_jax.architectures.base import Unit
from ahcptq_jax.quantizers.searches.grouping import ladder_stages
from ahcptq_jax.reconstruction import learning, together
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from ahcptq_jax.reconstruction.folder import StateFolder
from ahcptq_jax.reconstruction.objectives import Objective
from ahcptq_jax.reconstruction.regrouping import regroup
from ahcptq_jax.reconstruction.together import Deal
from ahcptq_jax.reconstruction.units import Dataset, Feeder


class Ending(NamedTuple):
    """The form that the quantizers of a unit end in.

    Attributes:
        groups: the number of groups at the end of CAG's ladder; 0 if there is no ladder.
        metric: the metric of the k-means that groups channels.
        grid_bits: the bits of the grid that they end on; 0 for none.
    """

    groups: int
    metric: str
    grid_bits: int


class _Chunk(NamedTuple):
    """Iterations `first` to `last - 1`, before which channels are brought into each of `rungs` groups."""

    first: int
    last: int
    rungs: tuple[int, ...]


def fit(
    unit: Unit,
    problem: learning.Problem,
    state: learning.State,
    data: Dataset,
    objective: Objective,
    config: ReconstructionConfig,
    ending: Ending,
    folder: StateFolder,
    bar: tqdm,
    deal: Deal,
) -> learning.State:
    """Learns a unit, from its intermediate state if one was saved.

    Args:
        unit: the unit that is learned.
        problem, state: from `learning.start`.
        data: its inputs and targets; `objective.context` is `data.context`.
        objective: the loss that is minimised.
        config: the settings of the reconstruction.
        ending: the form in which the quantizers end.
        folder: keeps the state every `config.save_seconds`.
        bar: counts iterations.
        deal: says which images a slot of the batch draws from; `data` has those of this process.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(unit.name.encode()))
    batch_key, step_key = jax.random.split(key)
    # All at once, so that neither chunks nor interruptions change what is drawn.
    drawn = deal.draw(batch_key, config.iterations)
    first, state = folder.load_partial(unit, state)
    feed = Feeder(data, config.chunk, deal, config.memory_budget // 2)
    # Settings that do not influence a step are set to their defaults, so that they do not compile it again.
    static = dataclasses.replace(config.result_settings(), seed=0, parts=ReconstructionConfig().parts)
    how = learning.Learning(unit.operation, objective.loss, static, ending.grid_bits)
    advance = learning.advance if config.batch == 1 else partial(together.advance, deal=deal)
    advance = partial(advance, how=how)
    problem, shared = devices.replicated((problem, objective.shared), deal.mesh)
    bar.set_description(unit.name)
    bar.update(first)
    saved = time.monotonic()
    for chunk in _chunks(first, config, ending.groups, feed.chunk):
        if chunk.first > first and time.monotonic() - saved >= config.save_seconds:
            folder.save_partial(unit, state, chunk.first)
            saved = time.monotonic()
        if chunk.rungs:
            state = devices.on_host(state, deal.mesh)
        for wanted in chunk.rungs:
            state = regroup(state, wanted, ending.groups, ending.metric)
        if chunk.first == chunk.last:
            break
        store, places = feed(np.resize(drawn[chunk.first : chunk.last], (feed.chunk, config.batch)))
        ends = np.int32(chunk.first), np.int32(chunk.last)
        state = devices.replicated(state, deal.mesh)
        state, losses = advance(problem, state, store, places, *ends, step_key, shared)
        _show(bar, chunk.last - chunk.first, losses)
    return devices.on_host(state, deal.mesh)


def _chunks(first: int, config: ReconstructionConfig, groups: int, chunk: int) -> Iterator[_Chunk]:
    """The chunks from iteration `first` on; the last is empty and stands for what is done after all iterations."""
    rungs: list[tuple[int, int]] = []
    if groups:
        rungs = list(zip(config.regroup_steps(), ladder_stages(groups), strict=True))
    stops = sorted({first, *range(0, config.iterations, chunk), *(at for at, _ in rungs), config.iterations})
    for step, stop in zip(stops, [*stops[1:], config.iterations], strict=True):
        if step >= first:
            yield _Chunk(step, stop, tuple(wanted for at, wanted in rungs if at == step))


def _show(bar: tqdm, steps: int, losses: Any) -> None:
    bar.update(steps)
    if not bar.disable:
        error, penalty = np.asarray(losses)
        bar.set_postfix(error=f"{error:.3g}", rounding=f"{penalty:.3g}", refresh=False)
