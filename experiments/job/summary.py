"""The scores of a run as lines for a terminal."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

_ROWS = ("fp", "quantized", "fp_blank", "quantized_blank")


def summary(results: Mapping[str, Any]) -> str:
    """A small table of the scores, and agreement, bytes and seconds below it.

    Args:
        results: what `results.json` holds.
    """
    rows = [(name, results[name]) for name in _ROWS if name in results]
    rows = list(itertools.chain(rows, results.get("baselines", {}).items()))
    names = list(rows[0][1])
    lines = [" " * 18 + "".join(f"{name:>8}" for name in names)]
    for key, metrics in rows:
        cells = ("-" if metrics[n] is None else f"{metrics[n]:.{3 if n == 'mIoU' else 1}f}" for n in names)
        lines.append(f"{key:<18}" + "".join(f"{cell:>8}" for cell in cells))
    if results.get("agreement_mIoU") is not None:
        lines.append(f"agreement of quantized and fp masks (mIoU): {results['agreement_mIoU']:.3f}")
    if "quantized" in results:
        sizes = results["bytes"]
        share = sizes["quantized"] / sizes["fp32"]
        lines.append(f"bytes: {sizes['fp32']:,} -> {sizes['quantized']:,} ({100 * share:.1f} %)")
    if "protocol" in results:
        lines.append(results["protocol"]["sentence"])
    lines.append("seconds: " + json.dumps(results["seconds"]))
    return "\n".join(lines)
