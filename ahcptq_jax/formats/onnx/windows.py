"""Square grids of tokens cut into square windows, and joined again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ahcptq_jax.formats.onnx.graph import Graph


@dataclasses.dataclass(frozen=True)
class Windows:
    """How the tokens of a grid are attended to.

    Attributes:
        grid: tokens on a side of the grid.
        side: tokens on a side of a window; the last windows may reach over the edge.
        heads: of the attention.
        width: of a head.
    """

    grid: int
    side: int
    heads: int
    width: int

    @property
    def rows(self) -> int:
        """Windows along a side of the grid."""
        return -(-self.grid // self.side)

    @property
    def count(self) -> int:
        return self.rows**2

    @property
    def tokens(self) -> int:
        """Of a window."""
        return self.side**2

    @property
    def features(self) -> int:
        return self.heads * self.width

    def cut(self, graph: Graph, x: str, fill: Callable[[], str]) -> str:
        """(grid*grid, features) -> (count, tokens, heads, width); beyond the edge is what `fill` makes, (features,)."""
        y = graph.reshape(x, self.grid, self.grid, self.features)
        more = self.rows * self.side - self.grid
        if more:
            y = _pad(graph, y, fill(), self.grid, more)
        y = graph.reshape(y, self.rows, self.side, self.rows, self.side, self.features)
        return graph.reshape(graph.transpose(y, 0, 2, 1, 3, 4), self.count, self.tokens, self.heads, self.width)

    def join(self, graph: Graph, x: str) -> str:
        """(count, heads, tokens, width) -> (grid*grid, features)."""
        rows, side, whole = self.rows, self.side, self.rows * self.side
        out = graph.reshape(x, rows, rows, self.heads, side, side, self.width)
        out = graph.reshape(graph.transpose(out, 0, 3, 1, 4, 2, 5), whole, whole, self.features)
        if whole > self.grid:
            out = graph.node("Slice", out, graph.shape(0, 0), graph.shape(self.grid, self.grid), graph.shape(0, 1))
        return graph.reshape(out, self.grid**2, self.features)


def _pad(graph: Graph, x: str, fill: str, grid: int, more: int) -> str:
    """(g, g, D) -> (g + more, g + more, D), the new ones being `fill` (D,)."""
    dim_of_fill = graph.node("Shape", fill)
    beside = graph.node("Expand", fill, graph.node("Concat", graph.shape(grid, more), dim_of_fill, axis=0))
    below = graph.node("Expand", fill, graph.node("Concat", graph.shape(more, grid + more), dim_of_fill, axis=0))
    return graph.node("Concat", graph.node("Concat", x, beside, axis=1), below, axis=0)
