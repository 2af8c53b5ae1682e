"""How often each code occurs: what decides whether HLUQ and AGQ shift, multiply or skip.

A histogram of a site counts its codes, `counts[c]` for code `c` in `0..2^bits-1`, in the code layouts of
`ahcptq_jax.quantizers.Hybrid` and `Log2`. The JSON form of a set of them is

    {"code_histograms": {"image_encoder/blocks_0/mlp/lin2/input": {"counts": [...], "log_levels": 4},
                         "image_encoder/blocks_0/attn/softmax": {"counts": [...], "tau": 2}}}

and a `results.json` that has this key serves as well.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """Codes of one site.

    Attributes:
        counts: (2^bits,) occurrences.
        log_levels: hybrid sites: number of logarithmic codes; code `log_levels` is then zero.
        tau: log2 sites: levels per octave, 1, 2 or 4; the last code is zero.
    """

    counts: tuple[int, ...]
    log_levels: int | None = None
    tau: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(int(c) for c in self.counts))
        size = len(self.counts)
        if size not in (4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"A histogram of {size} codes is none of 2 to 8 bits; give counts of length 2^bits.")
        if min(self.counts) < 0 or sum(self.counts) == 0:
            raise ValueError("A histogram's counts must be non-negative with a positive sum; count some activations.")
        if self.log_levels is not None and not 1 <= self.log_levels <= size - 2:
            raise ValueError(f"log_levels={self.log_levels} must lie in 1..{size - 2} for {size} codes.")
        if self.tau is not None and self.tau not in (1, 2, 4):
            raise ValueError(f"tau={self.tau} must be 1, 2 or 4.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Fractions of a tensor's codes by what the processing element does with them; they sum to 1.

    Attributes:
        shift: logarithmic codes: shift the weight and add.
        zero: the code of zero: nothing.
        multiply: uniform codes: multiply-accumulate.
    """

    shift: float = 0.0
    zero: float = 0.0
    multiply: float = 0.0

    def __post_init__(self) -> None:
        values = (self.shift, self.zero, self.multiply)
        if min(values) < 0 or abs(sum(values) - 1) > 1e-9:
            raise ValueError(f"Shares {values} must be non-negative and sum to 1.")


def hybrid_shares(histogram: Histogram) -> Shares:
    """Shares of an HLUQ site: codes below `log_levels` shift, `log_levels` is zero, the rest multiply.

    Raises:
        ValueError: if the histogram has no `log_levels`.
    """
    if histogram.log_levels is None:
        raise ValueError("A hybrid site's histogram needs log_levels, the number of its logarithmic codes.")
    counts, levels = np.asarray(histogram.counts, float), histogram.log_levels
    shift, zero = counts[:levels].sum() / counts.sum(), counts[levels] / counts.sum()
    return Shares(shift=float(shift), zero=float(zero), multiply=max(0.0, 1.0 - float(shift) - float(zero)))


def log2_shares(histogram: Histogram) -> Shares:
    """Shares of an AGQ site: the last code is zero, the others shift."""
    counts = np.asarray(histogram.counts, float)
    zero = float(counts[-1] / counts.sum())
    return Shares(shift=1.0 - zero, zero=zero)


def histograms(sites: Mapping[str, Any]) -> dict[str, Histogram]:
    """Histograms from {site path: counts}, {site path: {"counts": ..., "log_levels": ..., "tau": ...}} or records."""
    result = {}
    for path, value in sites.items():
        if isinstance(value, Histogram):
            result[path] = value
        elif isinstance(value, Mapping):
            unknown = sorted(set(value) - {"counts", "log_levels", "tau"})
            if unknown or "counts" not in value:
                raise ValueError(f"The histogram of {path} needs counts, may have log_levels and tau; got {unknown}.")
            result[path] = Histogram(**{str(k): v for k, v in value.items()})
        else:
            result[path] = Histogram(counts=_as_counts(path, value))
    return result


def _as_counts(path: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence | np.ndarray):
        raise ValueError(f"The histogram of {path} must be a list of counts, got {type(value).__name__}.")
    return tuple(int(v) for v in value)


def load_histograms(path: str | os.PathLike[str]) -> dict[str, Histogram]:
    """Reads the JSON form (see the module's head).

    Raises:
        ValueError: if the file is not JSON or holds no histograms.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); give a file with code_histograms.") from error
    sites = document.get("code_histograms") if isinstance(document, dict) else None
    if not isinstance(sites, dict) or not sites:
        raise ValueError(f'{path} has no "code_histograms"; write one with hwcost.save_histograms.')
    return histograms(sites)


def save_histograms(path: str | os.PathLike[str], sites: Mapping[str, Histogram]) -> None:
    """Writes the JSON form."""
    document = {
        name: {key: value for key, value in dataclasses.asdict(histogram).items() if value is not None}
        for name, histogram in sites.items()
    }
    Path(path).write_text(json.dumps({"code_histograms": document}, indent=1) + "\n", encoding="utf-8")


def measure_histograms(model: Any, images: Sequence[Any], prompts: Sequence[Any]) -> dict[str, Histogram]:
    """Counts the codes of every hybrid and log2 site of a `Quantized` model while it segments images.

    Args:
        model: `ahcptq_jax.Quantized`.
        images: (B, S, S, 3) float arrays, normalised and padded (`sam_flax.preprocessing`).
        prompts: for each of them boxes (N, 4) in canvas pixels.

    Returns:
        Site path -> histogram, summed over the images.
    """
    import jax

    from ahcptq_jax.quantizers import Hybrid, Log2
    from ahcptq_jax.sites import intercept_sites
    from sam_flax.sam import Sam

    wanted = {path: q for path, q in model.activations.items() if isinstance(q, Hybrid | Log2)}
    totals = {path: np.zeros(2**q.bits, np.int64) for path, q in wanted.items()}

    # One pass sees every site under its full path; debug callbacks add up, since attention comes in chunks.
    def handle(path: str, value: Any) -> Any:
        quantizer = model.activations.get(path)
        if quantizer is None:
            return value
        if path in wanted:
            counts = jax.numpy.bincount(quantizer.encode(value).reshape(-1), length=2**quantizer.bits)
            jax.debug.callback(lambda c, path=path: totals[path].__iadd__(np.asarray(c)), counts)
        return quantizer.fake_quant(value)

    params = model.float_params()
    for image, boxes in zip(images, prompts, strict=True):
        with intercept_sites(handle):
            out = Sam.apply(model.sam, {"params": params}, image, boxes=boxes, multimask_output=False)
        jax.block_until_ready(out)
    jax.effects_barrier()
    return {
        path: Histogram(
            counts=tuple(totals[path].tolist()),
            log_levels=int(np.asarray(q.log_levels)) if isinstance(q, Hybrid) else None,
            tau=int(np.asarray(q.tau)) if isinstance(q, Log2) else None,
        )
        for path, q in wanted.items()
        if totals[path].sum()
    }
