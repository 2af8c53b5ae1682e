"""Layers as charts: activations beside their codes, channels within their groups."""

import io
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.report.colours import palette
from experiments.report.panels import GroupPanel, HybridPanel
from experiments.report.pictures import data_uri

# Bars of one channel are thinner than a pixel beyond this number, so channels are then thinned out evenly.
_MAX_BARS = 400


def chart(panel: HybridPanel | GroupPanel, ink: str) -> str:
    """A layer's chart on a transparent ground, for a page of that ink, as a data URI."""
    figure = Figure(figsize=(9.6, 3.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if isinstance(panel, HybridPanel):
        _plot_hybrid(figure, panel, ink)
    else:
        _plot_groups(figure, panel, ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return data_uri(buffer.getvalue())


def describe(panel: HybridPanel | GroupPanel) -> str:
    """What a layer's chart shows, in words."""
    return _describe_hybrid(panel) if isinstance(panel, HybridPanel) else _describe_groups(panel)


def _plot_hybrid(figure: Figure, panel: HybridPanel, ink: str) -> None:
    """The whole histogram, and beside it the part up to the breakpoint."""
    codes = np.sort(np.asarray(panel.codes, np.float64))
    edges = np.asarray(panel.edges, np.float64)
    logarithmic = codes <= panel.breakpoint + _tolerance(codes)
    hues = palette(ink)
    whole, near = figure.subplots(1, 2, width_ratios=[3, 2])
    start = min(edges[0], codes[0])
    reach = max(edges[-1], codes[-1]) - start
    dense = max(panel.breakpoint - start, 1e-12)
    limits = ((start - 0.02 * reach, start + 1.02 * reach), (start - 0.06 * dense, start + 1.12 * dense))
    for axes, (left, right), title in zip((whole, near), limits, ("Whole range", "Up to the breakpoint"), strict=True):
        _style_axes(axes, ink)
        # Empty bins would lie at minus infinity; below one value there is nothing to show.
        axes.set_ylim(0.5, 3 * max(float(np.max(panel.counts)), 10.0))
        axes.set_yscale("log", nonpositive="clip")
        axes.stairs(panel.counts, edges, fill=True, color=ink, alpha=0.28, linewidth=0)
        axes.set_xlim(left, right)
        axes.set_title(title, loc="left", color=ink, fontsize=9)
        axes.set_xlabel("activation", color=ink)
        for values, colour, label in (
            (codes[logarithmic], hues[0], "logarithmic codes"),
            (codes[~logarithmic], hues[1], "uniform codes"),
        ):
            axes.vlines(values, 0, 0.16, transform=axes.get_xaxis_transform(), color=colour, linewidth=2, label=label)
            axes.vlines(values, 0.16, 1, transform=axes.get_xaxis_transform(), color=colour, linewidth=0.6, alpha=0.5)
        axes.axvline(panel.breakpoint, color=ink, linewidth=1.4, linestyle=(0, (5, 3)), label="breakpoint")
    whole.set_ylabel("values per bin (log)", color=ink)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, labelcolor=ink, fontsize=8)


def _plot_groups(figure: Figure, panel: GroupPanel, ink: str) -> None:
    """Scale and zero point of every channel, and beside it the channels' ranges within their groups'."""
    groups = np.unique(panel.groups, return_inverse=True)[1].reshape(-1)
    count = int(groups.max()) + 1
    low, high = (np.asarray(a, np.float64) for a in (panel.channel_min, panel.channel_max))
    hues = palette(ink)
    colours = [hues[group % len(hues)] for group in range(count)]
    labelled = count <= len(hues)
    scatter, bars = figure.subplots(1, 2, width_ratios=[2, 3])
    for axes in (scatter, bars):
        _style_axes(axes, ink)
    scatter.scatter(panel.scale, panel.zero_point, s=14, alpha=0.75, linewidths=0, c=[colours[g] for g in groups])
    for group in range(count if labelled else 0):
        scatter.scatter([], [], s=14, color=colours[group], label=f"group {group + 1}")
    scatter.set_xlabel("scale", color=ink)
    scatter.set_ylabel("zero point", color=ink)
    scatter.yaxis.set_major_locator(MaxNLocator(integer=True))
    scatter.set_title("Channels", loc="left", color=ink, fontsize=9)
    if labelled:
        figure.legend(loc="outside lower center", ncols=count, frameon=False, labelcolor=ink, fontsize=8)

    order = np.lexsort((high - low, groups))
    starts = np.searchsorted(groups[order], np.arange(count + 1))
    least, most = (
        np.array([reduce(values[groups == group]) for group in range(count)]) if given is None else np.asarray(given)
        for given, values, reduce in ((panel.group_min, low, np.min), (panel.group_max, high, np.max))
    )
    corners = [
        [(starts[g] - 0.5, least[g]), (starts[g + 1] - 0.5, least[g])]
        + [(starts[g + 1] - 0.5, most[g]), (starts[g] - 0.5, most[g])]
        for g in range(count)
    ]
    bars.add_collection(PolyCollection(corners, facecolors=colours, alpha=0.16, linewidths=0))
    every = math.ceil(len(order) / _MAX_BARS)
    shown = order[::every]
    x = np.arange(len(order))[::every]
    bars.vlines(x, low[shown], high[shown], colors=[colours[g] for g in groups[shown]], linewidth=1.2)
    bars.axhline(0, color=ink, linewidth=0.8, alpha=0.5)
    bars.set_xlim(-1, len(order))
    bars.autoscale_view(scalex=False)
    bars.set_xlabel("channel, sorted by group and width of range", color=ink)
    bars.set_ylabel("activation", color=ink)
    shaded = "of the group's codes" if panel.group_min is not None else "of the group"
    bars.set_title(f"Range of every channel (line) and {shaded} (shade)", loc="left", color=ink, fontsize=9)


def _describe_hybrid(panel: HybridPanel) -> str:
    """What the chart of a hybrid layer shows, in words."""
    codes, counts, edges = (np.asarray(a, np.float64) for a in (panel.codes, panel.counts, panel.edges))
    logarithmic = int((codes <= panel.breakpoint + _tolerance(codes)).sum())
    centres = (edges[:-1] + edges[1:]) / 2
    below = 100 * counts[centres <= panel.breakpoint].sum() / max(counts.sum(), 1)
    return (
        f"{logarithmic} codes up to the breakpoint {panel.breakpoint:.3g}, {len(codes) - logarithmic} "
        f"evenly spaced above it up to {codes.max():.3g}. {below:.1f} % of the values lie below the "
        "breakpoint."
    )


def _describe_groups(panel: GroupPanel) -> str:
    """What the chart of a grouped layer shows, in words."""
    sizes = np.unique(panel.groups, return_counts=True)[1]
    width = np.asarray(panel.channel_max, np.float64) - np.asarray(panel.channel_min, np.float64)
    return (
        f"{len(panel.groups)} channels in {len(sizes)} groups of {', '.join(map(str, sizes[:8]))}"
        f"{' …' if len(sizes) > 8 else ''}. The ranges of the channels are {width.min():.3g} to "
        f"{width.max():.3g} wide."
    )


def _style_axes(axes: Axes, ink: str) -> None:
    """Quiet axes that read on a light and on a dark page."""
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=ink, labelsize=8)
    axes.xaxis.label.set_fontsize(8.5)
    axes.yaxis.label.set_fontsize(8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
        spine.set_alpha(0.4)


def _tolerance(codes: np.ndarray) -> float:
    """Rounding that a code at the breakpoint may show."""
    return 1e-6 * max(float(np.ptp(codes)), 1e-12)
