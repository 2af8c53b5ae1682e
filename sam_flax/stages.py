"""An encoder as a graph of stages, so that it can be run, observed or quantized one stage at a time.

A stage is a module that is applied to the outputs of earlier stages. A plain chain, a feature pyramid whose neck takes
the outputs of several stages, and a U-shaped encoder are such graphs.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn

# The name, among a stage's inputs, of what the encoder's embedding makes of the image before the first stage.
EMBEDDED = "embedded"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A module applied to outputs of earlier stages.

    Modules without a parent compare by their fields: stages of one kind are equal functions of their own parameters,
    and share a compilation.

    Attributes:
        key: name of its output, unique in the graph.
        prefix: what the paths of its parameters and sites begin with, "image_encoder/blocks_0/" for instance.
        module: takes its inputs in order. It holds layers and is none itself: a layer has its path by its parent.
        inputs: keys of earlier stages, or `EMBEDDED`.
    """

    key: str
    prefix: str
    module: nn.Module
    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StageGraph:
    """Stages in an order in which they can be run.

    Attributes:
        stages: each after those whose outputs it takes.
        outputs: keys of the stages whose outputs are the image's embedding; one is handed on as it is, several as a
            tuple.

    Raises:
        ValueError: if a key is given twice, or an input or output is no earlier stage.
    """

    stages: tuple[Stage, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        check_order([(stage.key, stage.inputs) for stage in self.stages], self.outputs)

    def run(self, embedded: Any, apply: Callable[[Stage, tuple[Any, ...]], Any]) -> Any:
        """The image's embedding: `apply(stage, inputs)` for every stage in order.

        An output is dropped once no later stage takes it, so that a chain holds one at a time.
        """
        steps = [(stage.key, stage.inputs) for stage in self.stages]
        values = {EMBEDDED: embedded}
        for stage, dead in zip(self.stages, dead_after(steps, self.outputs), strict=True):
            values[stage.key] = apply(stage, tuple(values[key] for key in stage.inputs))
            for key in dead:
                del values[key]
        return joined([values[key] for key in self.outputs])


def joined(outputs: Sequence[Any]) -> Any:
    """The outputs of a graph as one value: a single one as it is, several as a tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def check_order(steps: Iterable[tuple[str, tuple[str, ...]]], outputs: tuple[str, ...]) -> None:
    """Raises ValueError unless steps, (key, inputs), take outputs of earlier ones and `outputs` are among them."""
    known = {EMBEDDED}
    for key, inputs in steps:
        if unknown := [name for name in inputs if name not in known]:
            raise ValueError(f"{key} takes {unknown[0]}, which no earlier stage makes.")
        if key in known:
            raise ValueError(f"There are two stages {key}.")
        known.add(key)
    if not outputs or any(name not in known for name in outputs):
        raise ValueError(f"The outputs {outputs} must be keys of stages.")


def dead_after(steps: Sequence[tuple[str, tuple[str, ...]]], outputs: tuple[str, ...]) -> list[set[str]]:
    """For each step, (key, inputs), the keys whose values nothing takes after it and that are no outputs."""
    last = {key: index for index, (key, _) in enumerate(steps)}
    last[EMBEDDED] = 0
    for index, (_, inputs) in enumerate(steps):
        last |= dict.fromkeys(inputs, index)
    return [{key for key, end in last.items() if end == index and key not in outputs} for index in range(len(steps))]
