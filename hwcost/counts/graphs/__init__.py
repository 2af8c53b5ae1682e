"""The graphs of models as layers, by the name of their architecture: a new model is a file here and a line below."""

import dataclasses
from collections.abc import Callable
from typing import Any

from hwcost.counts.builder import Builder
from hwcost.counts.graphs import mobile_sam, sam2, sam_vit


@dataclasses.dataclass(frozen=True)
class Graph:
    """How the layers of an architecture are counted.

    Attributes:
        add_layers: adds them all to a builder, given the model and the number of box prompts, in forward order.
        unmodelled: what they leave out, and why it may matter.
    """

    add_layers: Callable[[Builder, Any, int], None]
    unmodelled: tuple[str, ...] = ()


GRAPHS: dict[str, Graph] = {
    "mobile_sam": Graph(mobile_sam.add_layers, mobile_sam.UNMODELLED),
    "sam2": Graph(sam2.add_layers, sam2.UNMODELLED),
    "sam_vit": Graph(sam_vit.add_layers, sam_vit.UNMODELLED),
}


def graph_named(architecture: str) -> Graph:
    """The graph of an architecture (`ahcptq_jax.architectures`).

    Raises:
        ValueError: if there is none; the sentence says where it belongs.
    """
    if architecture not in GRAPHS:
        raise ValueError(
            f"hwcost has no graph of the architecture {architecture!r}; write hwcost/counts/graphs/{architecture}.py "
            f"and name it in GRAPHS, beside {', '.join(GRAPHS)}."
        )
    return GRAPHS[architecture]
