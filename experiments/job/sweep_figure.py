"""The sweep's table as a picture: AP of every setting, with the deviation over seeds."""

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_BAR = "#3b6ea5"
_REFERENCE = "#8a8a8a"


def draw(rows: dict[str, list[dict[str, Any]]]) -> bytes:
    """A PNG: one panel per model, a bar for each setting, a line for the floating-point model.

    Args:
        rows: by setting, "floating point:<model>" among them, one dict per seed with "AP" and "model".
    """
    models = list(dict.fromkeys(runs[0]["model"] for runs in rows.values()))
    panels = [{name: runs for name, runs in rows.items() if runs[0]["model"] == model} for model in models]
    heights = [1.0 + 0.28 * len(panel) for panel in panels]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, model, panel in zip(every, models, panels, strict=True):
        runs = {name: _aps(seeds) for name, seeds in panel.items() if not name.startswith("floating")}
        means = [float(np.mean(values)) for values in runs.values()]
        spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in runs.values()]
        places = np.arange(len(runs))
        errors = spreads if any(spreads) else None
        axes.barh(places, means, xerr=errors, color=_BAR, height=0.7, error_kw={"capsize": 2, "lw": 1})
        for place, mean, spread in zip(places, means, spreads, strict=True):
            text = "no AP" if np.isnan(mean) else f"{mean:.1f}"
            # On white, so that the reference line does not cross it.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.annotate(
                text,
                (np.nan_to_num(mean + spread), place),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox=box,
            )
        axes.set_yticks(places, list(runs), fontsize=8)
        for name, seeds in panel.items():
            if name.startswith("floating") and not np.isnan(ap := _aps(seeds)[0]):
                axes.axvline(ap, color=_REFERENCE, lw=1, ls="--")
                # Below the bars, so that it covers none.
                label = f"floating point {ap:.1f}"
                axes.text(ap, len(runs) - 0.4, label, ha="right", va="top", fontsize=8, color=_REFERENCE)
        axes.set_ylim(len(runs) + 0.2, -0.6)
        axes.set_xlim(0, None)
        axes.set_title(f"{model}: mask AP" + (", bars ± deviation over seeds" if any(spreads) else ""), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def _aps(seeds: list[dict[str, Any]]) -> list[float]:
    """AP of each seed; NaN where there was nothing to find, as on images whose objects are all crowds."""
    return [np.nan if run["AP"] is None else run["AP"] for run in seeds]
