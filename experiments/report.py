"""The report of a run: one HTML file that needs nothing else, to be read by people.

It shows the scores of the floating-point and the quantized model, masks of both side by side, and what the
activations of a few layers look like beside the codes that they are rounded to.
"""

import base64
import dataclasses
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils

from experiments.coco import BoxSet, CocoDataset
from experiments.evaluate import METRICS, EvaluationResult, agreement_miou
from experiments.results import write_atomically

# Okabe and Ito's colours, apart for colour-blind readers too; yellow is left out, it vanishes on white.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f5bd6", "#8c6d46")
_INK_ON_LIGHT, _INK_ON_DARK = "#1c2024", "#e6e8eb"
# Overlays are drawn so wide: enough for three beside each other on a large screen.
_PICTURE_WIDTH = 480
_MASK_OPACITY = 0.5
# Bars of one channel are thinner than a pixel beyond this number, so channels are then thinned out evenly.
_MAX_BARS = 400

_ROW_TITLES = {
    "fp": "Floating point",
    "quantized": "Quantized",
    "fp_blank": "Floating point, blank image",
    "quantized_blank": "Quantized, blank image",
    "filled_box": "Filled box, no model",
    "inscribed_ellipse": "Inscribed ellipse, no model",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One image with the masks of both models.

    Attributes:
      title: its caption.
      image: uint8 (H, W, 3).
      boxes: float (N, 4), the prompts, `(x0, y0, x1, y1)` in pixels.
      fp_masks: bool (N, H, W), the floating-point model's.
      quantized_masks: bool (N, H, W).
      gt_masks: bool (M, H, W), outlined on the image if given.
    """

    title: str
    image: np.ndarray
    boxes: np.ndarray
    fp_masks: np.ndarray
    quantized_masks: np.ndarray
    gt_masks: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class HybridPanel:
    """Activations of a layer that HLUQ quantizes.

    Attributes:
      name: the layer's site.
      counts: (B,) activations per bin.
      edges: (B + 1,) borders of the bins.
      codes: (L,) the values that the codes stand for.
      breakpoint: where the logarithmic codes end and the uniform ones begin, `m + s_l`.
    """

    name: str
    counts: np.ndarray
    edges: np.ndarray
    codes: np.ndarray
    breakpoint: float


@dataclasses.dataclass(frozen=True, eq=False)
class GroupPanel:
    """Channels of a layer that CAG groups.

    Attributes:
      name: the layer's site.
      channel_min: (C,) least activation of every channel in calibration.
      channel_max: (C,) greatest.
      scale: (C,) every channel's own scale, before grouping.
      zero_point: (C,) every channel's own zero point.
      groups: (C,) int, the group of every channel.
      group_min: (G,) least value that the group's codes reach; the extremes of its channels if not given.
      group_max: (G,) greatest.
    """

    name: str
    channel_min: np.ndarray
    channel_max: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    groups: np.ndarray
    group_min: np.ndarray | None = None
    group_max: np.ndarray | None = None


def write_report(
    out_dir: str | os.PathLike[str],
    results: Mapping[str, Any],
    examples: Sequence[Example],
    layers: Sequence[HybridPanel | GroupPanel],
    *,
    title: str = "SAM, quantized",
    notes: Sequence[str] = (),
) -> Path:
    """Writes `report.html`, complete or not at all.

    Args:
      out_dir: its folder.
      results: what `results.json` holds: metrics under `fp` and `quantized`, optionally `fp_blank`,
        `quantized_blank` and `baselines` (metrics by name); `agreement_mIoU`, `seconds`, `bytes`, `config`.
        What is absent is left out of the report.
      examples: images to show.
      layers: layers to show.
      title: headline.
      notes: sentences to print below the table, such as those about clipped boxes.

    Returns:
      The file.

    Raises:
      ValueError: if the file cannot be written.
    """
    sections = [
        _summary(results),
        _scores(results, notes),
        _gallery(examples),
        _layers(layers),
        _settings(results),
    ]
    document = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{_escape(title)}</h1>{_subtitle(results.get('config'))}</header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )
    return write_atomically(Path(out_dir) / "report.html", document)


def make_examples(
    dataset: CocoDataset,
    boxes: BoxSet,
    fp: EvaluationResult,
    quantized: EvaluationResult,
    *,
    count: int = 6,
    max_boxes: int = 8,
) -> list[Example]:
    """Picks images evenly from the best to the worst agreement between both models, so that none is
    flattered.

    Args:
      dataset: the evaluated images.
      boxes: the prompts of both evaluations.
      fp: the floating-point model's evaluation.
      quantized: the quantized model's.
      count: how many images.
      max_boxes: how many prompts to draw per image, those with the best scores and then the largest.
    """
    agreement = {}
    for item in dataset.items:
        key = item.image_id
        value = agreement_miou({key: fp.images[key]}, {key: quantized.images[key]})
        if value is not None:
            agreement[key] = value
    shown = [item for item in dataset.items if item.image_id in agreement]
    ranked = sorted(shown, key=lambda item: -agreement[item.image_id])
    chosen = np.linspace(0, max(len(ranked) - 1, 0), min(count, len(ranked))).round().astype(int)
    examples = []
    for index in chosen:
        item = ranked[index]
        prompts = boxes.per_image[item.image_id]
        area = np.prod(prompts.boxes[:, 2:] - prompts.boxes[:, :2], axis=1)
        drawn = np.lexsort((-area, -prompts.scores))[:max_boxes]
        truth = [dataset.ground_truth_rle(int(i)) for i in prompts.annotation_ids[drawn] if i]
        some = "" if len(drawn) == len(prompts) else f" ({len(drawn)} of them drawn)"
        examples.append(
            Example(
                title=f"{item.name}: {len(prompts)} boxes{some}, agreement {agreement[item.image_id]:.2f}",
                image=dataset.read_image(item),
                boxes=prompts.boxes[drawn],
                fp_masks=fp.images[item.image_id].masks(list(drawn)),
                quantized_masks=quantized.images[item.image_id].masks(list(drawn)),
                gt_masks=np.stack([mask_utils.decode(rle).astype(bool) for rle in truth]) if truth else None,
            )
        )
    return examples


def _summary(results: Mapping[str, Any]) -> str:
    """The few numbers that answer "what did quantization cost, and what did it save?"."""
    tiles = []
    fp, quantized = _metric(results, "fp", "AP"), _metric(results, "quantized", "AP")
    if fp is not None:
        tiles.append((f"{fp:.1f}", "mask AP, floating point"))
    if quantized is not None:
        kept = f", {100 * quantized / fp:.0f}\u00a0% of it" if fp else ""
        tiles.append((f"{quantized:.1f}", f"mask AP, quantized{kept}"))
    agreement = results.get("agreement_mIoU")
    if agreement is not None:
        tiles.append((f"{agreement:.2f}", "mean IoU of both models' masks"))
    sizes = results.get("bytes") or {}
    if sizes.get("fp32") and sizes.get("quantized"):
        ratio = sizes["fp32"] / sizes["quantized"]
        tiles.append((f"{ratio:.1f}×", f"smaller: {_bytes(sizes['fp32'])} to {_bytes(sizes['quantized'])}"))
    blank = _metric(results, "fp_blank", "AP")
    if blank is not None:
        tiles.append((f"{blank:.1f}", "mask AP on blank images, floating point"))
    if not tiles:
        return ""
    cells = "".join(f"<div><dd>{_escape(value)}</dd><dt>{_escape(what)}</dt></div>" for value, what in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _scores(results: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The table of metrics, one row per model or baseline."""
    rows = [(key, results[key]) for key in ("fp", "quantized", "fp_blank", "quantized_blank") if results.get(key)]
    rows += list((results.get("baselines") or {}).items())
    if not rows:
        return ""
    body = ""
    for key, metrics in rows:
        cells = "".join(f"<td>{_number(metrics.get(name), name)}</td>" for name in METRICS)
        kind = "main" if key in ("fp", "quantized") else "aside"
        body += f'<tr class="{kind}"><th scope="row">{_escape(_ROW_TITLES.get(key, key))}</th>{cells}</tr>'
        if key == "quantized" and results.get("fp"):
            kept = "".join(f"<td>{_share(metrics.get(n), results['fp'].get(n))}</td>" for n in METRICS)
            body += f'<tr class="kept"><th scope="row">Kept by quantization</th>{kept}</tr>'
    head = "".join(f'<th scope="col">{name}</th>' for name in METRICS)
    blank = (
        " A blank image is mid-gray and of the same size: what is scored there comes from the boxes alone, "
        "so a model that sees scores far more on the real image."
        if results.get("fp_blank") or results.get("quantized_blank")
        else ""
    )
    remarks = "".join(f"<li>{_escape(note)}</li>" for note in notes)
    return (
        "<section><h2>Scores</h2>"
        '<div class="scroll" role="region" aria-label="Scores" tabindex="0"><table>'
        f'<thead><tr><th scope="col">Masks of</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "<p class=note>AP as COCO defines it, in percent: AP averages IoU thresholds from 0.50 to 0.95, "
        "AP50 and AP75 take one; APs, APm and APl take objects below 32², up to 96² and above 96² pixels. "
        "mIoU is the mean overlap with the true mask, from 0 to 1. A dash: nothing of that kind to "
        f"score.{blank}</p>" + (f"<ul class=note>{remarks}</ul>" if remarks else "") + "</section>"
    )


def _gallery(examples: Sequence[Example]) -> str:
    """Image, floating-point masks and quantized masks of every example."""
    if not examples:
        return ""
    figures = "".join(_example(example) for example in examples)
    truth = any(example.gt_masks is not None for example in examples)
    outline = " with the box prompts" + (" and dotted white outlines of the true masks" if truth else "")
    return (
        "<section><h2>Masks</h2>"
        f"<p>Left: the image{outline}. Middle: masks of the floating-point model. Right: masks of the "
        "quantized model. A colour is one box and its masks.</p>"
        f"{figures}</section>"
    )


def _example(example: Example) -> str:
    """One example as a figure of three pictures."""
    height, width = example.image.shape[:2]
    count = len(example.boxes)
    pictures = (
        ("Image and boxes", _draw_prompts(example), f"{example.title}. The image with {count} box prompts."),
        (
            "Floating point",
            _draw_masks(example.image, example.fp_masks),
            f"{example.title}. {_covered(example.fp_masks)} by the floating-point model.",
        ),
        (
            "Quantized",
            _draw_masks(example.image, example.quantized_masks),
            f"{example.title}. {_covered(example.quantized_masks)} by the quantized model.",
        ),
    )
    cells = "".join(
        f'<div><img src="{_png(picture)}" alt="{_escape(alt)}" width="{width}" height="{height}">'
        f"<span>{label}</span></div>"
        for label, picture, alt in pictures
    )
    caption = f"<figcaption>{_escape(example.title)}</figcaption>"
    # Upright pictures would tower over the rest at full width.
    share = min(1.0, width / height)
    return (
        f'<figure class="example" style="max-width: max(20rem, {100 * share:.0f}%)">'
        f'<div class="triple">{cells}</div>{caption}</figure>'
    )


def _covered(masks: np.ndarray) -> str:
    """What the masks cover, in words."""
    share = 100 * float(np.any(masks, axis=0).mean()) if len(masks) else 0.0
    return f"{len(masks)} masks that cover {share:.0f} % of the image"


def _draw_prompts(example: Example) -> Image.Image:
    """The image with its boxes, and dotted outlines of the true masks."""
    picture = _resize(example.image)
    factor = picture.width / example.image.shape[1]
    if example.gt_masks is not None:
        pixels = np.array(picture)
        rows, columns = np.indices(pixels.shape[:2])
        dots = (rows + columns) // 3 % 2 == 0
        for mask in example.gt_masks:
            outline = _outline(_resize_mask(mask, picture.size))
            pixels[outline & dots] = 255
            pixels[outline & ~dots] = 0
        picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for index, box in enumerate(example.boxes):
        corners = [float(value) * factor for value in box]
        # A rectangle's far border belongs to it, so it must stay inside the picture.
        corners = [min(corners[0], picture.width - 2), min(corners[1], picture.height - 2), *corners[2:]]
        corners[2] = max(min(corners[2], picture.width - 1), corners[0] + 1)
        corners[3] = max(min(corners[3], picture.height - 1), corners[1] + 1)
        draw.rectangle(corners, outline=_PALETTE[index % len(_PALETTE)], width=3)
    return picture


def _draw_masks(image: np.ndarray, masks: np.ndarray) -> Image.Image:
    """The image, greyed and faded, below coloured masks with outlines; the largest mask lies lowest."""
    picture = _resize(image)
    grey = np.asarray(picture.convert("L"), np.float64)[..., None].repeat(3, axis=2)
    pixels = 0.75 * grey + 0.25 * 255
    for index in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        colour = np.array(_rgb(_PALETTE[index % len(_PALETTE)]), np.float64)
        mask = _resize_mask(masks[index], picture.size)
        pixels[mask] = (1 - _MASK_OPACITY) * pixels[mask] + _MASK_OPACITY * colour
        pixels[_outline(mask)] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _resize(image: np.ndarray) -> Image.Image:
    """The image at the report's width; small ones are enlarged by whole pixels, so that they stay honest."""
    picture = Image.fromarray(image).convert("RGB")
    size = (_PICTURE_WIDTH, max(1, round(picture.height * _PICTURE_WIDTH / picture.width)))
    return picture.resize(size, Image.Resampling.LANCZOS if picture.width > size[0] else Image.Resampling.NEAREST)


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at a picture's size, (H, W) bool."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0


def _outline(mask: np.ndarray) -> np.ndarray:
    """The border pixels of a mask, two wide."""
    inner = mask.copy()
    for _ in range(2):
        padded = np.pad(inner, 1)
        inner = inner & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask & ~inner


def _layers(layers: Sequence[HybridPanel | GroupPanel]) -> str:
    """The panels of the layers, by kind."""
    hybrid = [panel for panel in layers if isinstance(panel, HybridPanel)]
    grouped = [panel for panel in layers if isinstance(panel, GroupPanel)]
    text = ""
    if hybrid:
        figures = "".join(_figure(_plot_hybrid, panel, _describe_hybrid(panel)) for panel in hybrid)
        text += (
            "<section><h2>Activations and their hybrid codes (HLUQ)</h2>"
            "<p>Input of the second linear layer of an MLP: most values lie just above the minimum, few far "
            "out. Below the breakpoint the codes are spaced logarithmically and crowd where the values "
            "crowd; "
            f"above it they are spaced evenly.</p>{figures}</section>"
        )
    if grouped:
        figures = "".join(_figure(_plot_groups, panel, _describe_groups(panel)) for panel in grouped)
        text += (
            "<section><h2>Channels and their groups (CAG)</h2>"
            "<p>Input of a projection: every channel has its own range. Channels of like ranges share "
            "a scale and a zero point, so that the hardware holds a few pairs instead of one per "
            "channel.</p>"
            f"{figures}</section>"
        )
    return text


def _figure(plot: Any, panel: HybridPanel | GroupPanel, description: str) -> str:
    """A chart in both colour schemes with its caption, which is also its alternative text."""
    light, dark = (_png_chart(plot, panel, ink) for ink in (_INK_ON_LIGHT, _INK_ON_DARK))
    return (
        f'<figure class="chart"><figcaption><code>{_escape(panel.name)}</code> '
        f"{_escape(description)}</figcaption>"
        f'<div class="scroll"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_escape(panel.name + ": " + description)}"></picture></div></figure>'
    )


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


def _plot_hybrid(figure: Figure, panel: HybridPanel, ink: str) -> None:
    """The whole histogram, and beside it the part up to the breakpoint."""
    codes = np.sort(np.asarray(panel.codes, np.float64))
    edges = np.asarray(panel.edges, np.float64)
    logarithmic = codes <= panel.breakpoint + _tolerance(codes)
    palette = _palette(ink)
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
            (codes[logarithmic], palette[0], "logarithmic codes"),
            (codes[~logarithmic], palette[1], "uniform codes"),
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
    palette = _palette(ink)
    colours = [palette[group % len(palette)] for group in range(count)]
    labelled = count <= len(palette)
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


def _palette(ink: str) -> list[str]:
    """The palette for a page of that ink; on a dark one the colours are lighter."""
    white = 0.3 if ink == _INK_ON_DARK else 0.0
    mixed = ([round((1 - white) * part + white * 255) for part in _rgb(colour)] for colour in _PALETTE)
    return ["#{:02x}{:02x}{:02x}".format(*parts) for parts in mixed]


def _tolerance(codes: np.ndarray) -> float:
    """Rounding that a code at the breakpoint may show."""
    return 1e-6 * max(float(np.ptp(codes)), 1e-12)


def _settings(results: Mapping[str, Any]) -> str:
    """Configuration, time and size of the run."""
    config = dict(_flatten(results.get("config") or {}))
    seconds = {key: f"{value:.1f} s" for key, value in _flatten(results.get("seconds") or {}) if value is not None}
    sizes = {key: _bytes(value) for key, value in _flatten(results.get("bytes") or {}) if value is not None}
    tables = "".join(
        f"<div><h3>{title}</h3><dl class=pairs>"
        + "".join(f"<dt>{_escape(key)}</dt><dd>{_escape(_text(value))}</dd>" for key, value in pairs.items())
        + "</dl></div>"
        for title, pairs in (("Configuration", config), ("Time", seconds), ("Weights", sizes))
        if pairs
    )
    return f"<section><h2>Run</h2><div class=settings>{tables}</div></section>" if tables else ""


def _subtitle(config: Any) -> str:
    """The settings that tell runs apart, below the headline."""
    if not isinstance(config, Mapping):
        return ""
    bits = [f"W{config['w_bits']}A{config['a_bits']}"] if {"w_bits", "a_bits"} <= config.keys() else []
    parts = bits + [str(config[key]) for key in ("method", "checkpoint", "dataset") if config.get(key)]
    return f"<p>{' · '.join(_escape(part) for part in parts)}</p>" if parts else ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Pairs of a nested mapping, with dotted names."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _metric(results: Mapping[str, Any], row: str, name: str) -> float | None:
    """One number of the table, or None."""
    value = (results.get(row) or {}).get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def _number(value: float | None, name: str) -> str:
    """A metric with as many digits as it deserves."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if name == "mIoU" else f"{value:.1f}"


def _share(part: float | None, whole: float | None) -> str:
    """How much of one metric another is."""
    return f"{100 * part / whole:.0f}\u00a0%" if part is not None and whole else "–"


def _text(value: Any) -> str:
    """A setting as people write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bytes(value: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g}\u00a0{unit}"
        value /= 1000
    return f"{value:.3g}\u00a0GB"


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _png(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png_chart(plot: Any, panel: HybridPanel | GroupPanel, ink: str) -> str:
    """A chart on a transparent ground as a data URI."""
    figure = Figure(figsize=(9.6, 3.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure, panel, ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1c2024; --soft: #5b646d;
  --line: #dcdfe3; --accent: #0b62a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --card: #1d2125; --ink: #e6e8eb;
  --soft: #a3acb5; --line: #343a41; --accent: #7cbcf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; margin: 0; letter-spacing: -0.015em; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
header p { margin: .35rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
section { margin-top: 3rem; }
section > p { max-width: 46rem; margin: 0 0 1rem; }
.note { color: var(--soft); font-size: .875rem; max-width: 52rem; margin: .8rem 0 0; }
ul.note { padding-left: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); margin: 2rem 0 0;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.tiles div { box-shadow: 1px 1px 0 var(--line); padding: 1rem 1.1rem; display: flex; flex-direction: column; }
.tiles dd { margin: 0; font-size: 1.9rem; line-height: 1.15; font-weight: 600; font-variant-numeric:
tabular-nums; } .tiles dt { color: var(--soft); font-size: .875rem; line-height: 1.35; margin-top: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; font-weight: 400; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; }
thead th:first-child { font-weight: 600; }
tr.main th, tr.main td { font-weight: 600; }
tr.kept th, tr.kept td { color: var(--accent); }
tr.aside th, tr.aside td { color: var(--soft); }
figure { margin: 0 0 1.75rem; }
figcaption { font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; }
.triple img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--line); }
.triple span { display: block; font-size: .8rem; color: var(--soft); margin-top: .2rem; }
.example figcaption { color: var(--ink); margin-top: .25rem; }
@media (max-width: 34rem) { .triple { grid-template-columns: 1fr; } }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; }
.chart img { display: block; width: 100%; min-width: 38rem; height: auto; margin-top: .5rem; }
.chart code { color: var(--ink); font-size: .95em; margin-right: .4rem; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1.5rem 2.5rem; }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.1rem; margin: 0; font-size:
.9rem; } .pairs dt { color: var(--soft); }
.pairs dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media print { body { background: none; } .example, .chart { break-inside: avoid; } }
"""
