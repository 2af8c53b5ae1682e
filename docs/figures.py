"""The figures of these pages, drawn by the project's own code: `python docs/figures.py` writes docs/*.svg anew."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from ahcptq_jax.quantizers import Hybrid, Uniform  # noqa: E402
from ahcptq_jax.quantizers.kinds import kind_of  # noqa: E402
from ahcptq_jax.quantizers.searches import grouping  # noqa: E402

HERE = Path(__file__).parent
BITS = 4


def save(figure: plt.Figure, name: str) -> None:
    """Writes an SVG file without what would differ from run to run."""
    figure.tight_layout()
    figure.savefig(HERE / name, metadata={"Date": None})
    plt.close(figure)


def _error(quantizer: Uniform | Hybrid, x: np.ndarray) -> float:
    return float(np.mean((np.asarray(quantizer.fake_quant(jnp.asarray(x))) - x) ** 2))


def hluq() -> None:
    """Values of GELU with the levels of a uniform and of a hybrid quantizer of the same range."""
    normal, spread = jax.random.normal(jax.random.key(0), (2, 20000))
    x = np.asarray(jax.nn.gelu(0.5 * normal * jnp.exp(0.7 * spread)))
    uniform = Uniform.from_range(x.min(), x.max(), BITS)
    found = [
        Hybrid.from_range(x.min(), x.max() - x.min(), breakpoint, share, BITS)
        for breakpoint in (0.1, 0.2, 0.3)
        for share in (0.125, 0.25, 0.5)
    ]
    hybrid = min(found, key=lambda quantizer: _error(quantizer, x))
    figure, axes = plt.subplots(2, 1, figsize=(8, 4), sharex=True)
    for axis, quantizer, name in zip(axes, (uniform, hybrid), ("uniform", "hybrid (HLUQ)"), strict=True):
        axis.hist(x, 120, color="0.75", histtype="stepfilled")
        for level in np.unique(np.asarray(quantizer.decode(jnp.arange(2**BITS)))):
            axis.axvline(level, color="tab:blue", linewidth=1)
        axis.set(yscale="log", ylabel="values", title=f"{name}: mean squared error {_error(quantizer, x):.2e}")
    axes[1].set_xlabel("activation after GELU; lines are the values of the 16 codes")
    save(figure, "hluq.svg")


def cag() -> None:
    """Ranges of channels in grey, and in colour those that the groups of each of them cover."""
    rng = np.random.default_rng(0)
    width = np.exp(rng.normal(0, 0.8, 64))
    centre = rng.normal(0, 0.4, 64) * width
    own = Uniform.from_range(jnp.asarray(centre - width), jnp.asarray(centre + width), BITS)
    groups = grouping.ladder(own.scale, own.zero_point, 4, metric="range", bits=BITS)[-1]
    labels, scale, zero = (np.asarray(a) for a in (groups.labels, groups.scale, groups.zero_point))
    order = np.lexsort([width, scale[labels]])
    figure, axis = plt.subplots(figsize=(8, 3))
    for place, channel in enumerate(order):
        group = labels[channel]
        shared = scale[group] * np.array([-zero[group], 2**BITS - 1 - zero[group]])
        axis.plot([place, place], shared, color=f"C{group}", linewidth=5, alpha=0.35)
        axis.plot([place, place], centre[channel] + np.array([-1, 1]) * width[channel], color="0.2", linewidth=2)
    axis.set(xlabel="channel, by group", ylabel="activations")
    save(figure, "cag.svg")


def grid() -> None:
    """The whole levels that 4-bit codes of HLUQ stand for on grids of 8 and of 6 bits."""
    figure, axis = plt.subplots(figsize=(8, 2.4))
    hybrid = Hybrid.from_range(-0.17, 4.17, 0.3, 0.25, BITS)
    for row, bits in enumerate((8, 6)):
        snapped = kind_of(hybrid).on_grid(hybrid, bits)
        levels = np.asarray(kind_of(snapped).levels(snapped).table)
        axis.plot(levels / levels.max(), np.full(len(levels), row), "|", markersize=16, color="tab:blue")
        axis.text(1.02, row, f"{bits} bits: levels 0 to {levels.max()}", va="center")
    axis.set(yticks=[], xlabel="level, as a share of the largest", xlim=(-0.02, 1.45), ylim=(-0.6, 1.6))
    save(figure, "grid.svg")


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "ahcptq"  # equal runs, equal files
    plt.rcParams["svg.fonttype"] = "none"  # text as text
    hluq()
    cag()
    grid()
