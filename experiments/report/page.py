"""The report as one HTML file."""

import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.evaluate import METRICS
from experiments.job.results import write_file
from experiments.report.charts import chart, describe
from experiments.report.colours import INK_ON_DARK, INK_ON_LIGHT
from experiments.report.examples import Example
from experiments.report.panels import GroupPanel, HybridPanel
from experiments.report.pictures import draw_masks, draw_prompts, png
from experiments.report.style import STYLE

_ROW_TITLES = {
    "fp": "Floating point",
    "quantized": "Quantized",
    "fp_blank": "Floating point, blank image",
    "quantized_blank": "Quantized, blank image",
    "filled_box": "Filled box, no model",
    "inscribed_ellipse": "Inscribed ellipse, no model",
}


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
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{_escape(title)}</h1>{_subtitle(results.get('config'))}</header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )
    return write_file(Path(out_dir) / "report.html", document)


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
        f"score.{blank}{_protocol(results)}</p>" + (f"<ul class=note>{remarks}</ul>" if remarks else "") + "</section>"
    )


def _protocol(results: Mapping[str, Any]) -> str:
    """How masks were asked for and ranked, as a sentence below the table."""
    sentence = (results.get("protocol") or {}).get("sentence", "")
    return _escape(f" {sentence[:1].upper()}{sentence[1:]}") if sentence else ""


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
        ("Image and boxes", draw_prompts(example), f"{example.title}. The image with {count} box prompts."),
        (
            "Floating point",
            draw_masks(example.image, example.fp_masks),
            f"{example.title}. {_covered(example.fp_masks)} by the floating-point model.",
        ),
        (
            "Quantized",
            draw_masks(example.image, example.quantized_masks),
            f"{example.title}. {_covered(example.quantized_masks)} by the quantized model.",
        ),
    )
    cells = "".join(
        f'<div><img src="{png(picture)}" alt="{_escape(alt)}" width="{width}" height="{height}">'
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


def _layers(layers: Sequence[HybridPanel | GroupPanel]) -> str:
    """The panels of the layers, by kind."""
    hybrid = [panel for panel in layers if isinstance(panel, HybridPanel)]
    grouped = [panel for panel in layers if isinstance(panel, GroupPanel)]
    text = ""
    if hybrid:
        figures = "".join(_figure(panel) for panel in hybrid)
        text += (
            "<section><h2>Activations and their hybrid codes (HLUQ)</h2>"
            "<p>Input of the second linear layer of an MLP: most values lie just above the minimum, few far "
            "out. Below the breakpoint the codes are spaced logarithmically and crowd where the values "
            "crowd; "
            f"above it they are spaced evenly.</p>{figures}</section>"
        )
    if grouped:
        figures = "".join(_figure(panel) for panel in grouped)
        text += (
            "<section><h2>Channels and their groups (CAG)</h2>"
            "<p>Input of a projection: every channel has its own range. Channels of like ranges share "
            "a scale and a zero point, so that the hardware holds a few pairs instead of one per "
            "channel.</p>"
            f"{figures}</section>"
        )
    return text


def _figure(panel: HybridPanel | GroupPanel) -> str:
    """A chart in both colour schemes with its caption, which is also its alternative text."""
    description = describe(panel)
    light, dark = (chart(panel, ink) for ink in (INK_ON_LIGHT, INK_ON_DARK))
    return (
        f'<figure class="chart"><figcaption><code>{_escape(panel.name)}</code> '
        f"{_escape(description)}</figcaption>"
        f'<div class="scroll"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_escape(panel.name + ": " + description)}"></picture></div></figure>'
    )


def _settings(results: Mapping[str, Any]) -> str:
    """Configuration, time and size of the run."""
    config = dict(_dotted(results.get("config") or {}))
    seconds = {key: f"{value:.1f} s" for key, value in _dotted(results.get("seconds") or {}) if value is not None}
    sizes = {key: _bytes(value) for key, value in _dotted(results.get("bytes") or {}) if value is not None}
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


def _dotted(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Pairs of a nested mapping, with dotted names."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _dotted(value, f"{prefix}{key}.")
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
