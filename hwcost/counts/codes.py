"""How often each code occurs: what decides whether HLUQ and AGQ shift, multiply or skip.

A histogram of a site counts its codes, `counts[c]` for code `c` in `0..2^bits-1`, in the code layouts of
`ahcptq_jax.quantizers.Hybrid` and `Log2`. The JSON form of a set of them is

    {"code_histograms": {"image_encoder/blocks_0/mlp/lin2/input": {"counts": [...], "log_levels": 4},
                         "image_encoder/blocks_0/attn/softmax": {"counts": [...], "tau": 2}}}

and a `results.json` that has this key serves as well.
"""

import dataclasses
import functools
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_flax.errors import InputError


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
            raise InputError(f"A histogram of {size} codes is none of 2 to 8 bits; give counts of length 2^bits.")
        if min(self.counts) < 0 or sum(self.counts) == 0:
            raise InputError("A histogram's counts must be non-negative with a positive sum; count some activations.")
        if self.log_levels is not None and not 1 <= self.log_levels <= size - 2:
            raise InputError(f"log_levels={self.log_levels} must lie in 1..{size - 2} for {size} codes.")
        if self.tau is not None and self.tau not in (1, 2, 4):
            raise InputError(f"tau={self.tau} must be 1, 2 or 4.")


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
        InputError: if the histogram has no `log_levels`.
    """
    if histogram.log_levels is None:
        raise InputError("A hybrid site's histogram needs log_levels, the number of its logarithmic codes.")
    counts, levels = np.asarray(histogram.counts, float), histogram.log_levels
    shift, zero = counts[:levels].sum() / counts.sum(), counts[levels] / counts.sum()
    return Shares(shift=float(shift), zero=float(zero), multiply=max(0.0, 1.0 - float(shift) - float(zero)))


def log2_shares(histogram: Histogram) -> Shares:
    """Shares of an AGQ site: the last code is zero, the others shift."""
    counts = np.asarray(histogram.counts, float)
    zero = float(counts[-1] / counts.sum())
    return Shares(shift=1.0 - zero, zero=zero)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssumedCodes:
    """What a site without a histogram takes.

    Attributes:
        hybrid: shares of HLUQ codes.
        log2: shares of AGQ codes.
        tau: levels per octave of AGQ.
        grid_rate: share of HLUQ's code space that is logarithmic.
        source: where that comes from.
    """

    hybrid: Shares
    log2: Shares
    tau: int
    grid_rate: float
    source: str

    def log_levels(self, bits: int) -> int:
        """Logarithmic codes at a width, as `ahcptq_jax.quantizers.hybrid` counts them."""
        return int(min(max(1, round(self.grid_rate * 2**bits)), 2**bits - 2))


def pooled(sites: Mapping[str, Histogram], source: str) -> AssumedCodes:
    """The codes of all sites together; tau and the number of log codes are those that most codes have.

    Raises:
        InputError: if there are no hybrid or no log2 sites.
    """
    hybrid = [h for h in sites.values() if h.log_levels is not None]
    log2 = [h for h in sites.values() if h.tau is not None]
    if not hybrid or not log2:
        raise InputError(f"{source} has {len(hybrid)} hybrid and {len(log2)} log2 sites; pooling needs both kinds.")

    def pool(shares: Sequence[Shares], group: Sequence[Histogram]) -> Shares:
        weights = np.array([sum(h.counts) for h in group], float)
        shift, zero = (float(weights @ [getattr(s, n) for s in shares] / weights.sum()) for n in ("shift", "zero"))
        return Shares(shift=shift, zero=zero, multiply=max(0.0, 1.0 - shift - zero))

    def most(pairs: list[tuple[float, int]]) -> float:
        totals: dict[float, int] = {}
        for value, count in pairs:
            totals[value] = totals.get(value, 0) + count
        return max(totals, key=lambda value: totals[value])

    return AssumedCodes(
        hybrid=pool([hybrid_shares(h) for h in hybrid], hybrid),
        log2=pool([log2_shares(h) for h in log2], log2),
        tau=int(most([(h.tau or 1, sum(h.counts)) for h in log2])),
        grid_rate=most([((h.log_levels or 1) / len(h.counts), sum(h.counts)) for h in hybrid]),
        source=source,
    )


@functools.cache
def mini_codes() -> AssumedCodes:
    """The pooled codes of mini-scenes, a small SAM, at W4A4; the file names the command that measured them."""
    name = "mini_w4a4_codes.json"
    with importlib.resources.as_file(importlib.resources.files("hwcost") / "data" / name) as path:
        return pooled(load_histograms(path), f"codes of mini-scenes at W4A4 on its scenes (hwcost/data/{name}), pooled")


def histograms(sites: Mapping[str, Any]) -> dict[str, Histogram]:
    """Histograms from {site path: counts}, {site path: {"counts": ..., "log_levels": ..., "tau": ...}} or records."""
    result = {}
    for path, value in sites.items():
        if isinstance(value, Histogram):
            result[path] = value
        elif isinstance(value, Mapping):
            if "counts" not in value or set(value) - {"counts", "log_levels", "tau"}:
                raise InputError(
                    f"The histogram of {path} has the keys {sorted(value)}; it needs counts and may have log_levels "
                    "and tau."
                )
            rest = {name: _whole(path, name, value[name]) for name in ("log_levels", "tau") if name in value}
            result[path] = Histogram(counts=_as_counts(path, value["counts"]), **rest)
        else:
            result[path] = Histogram(counts=_as_counts(path, value))
    return result


def _as_counts(path: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise InputError(f"The histogram of {path} is a {type(value).__name__}; give a list of counts.")
    return tuple(_whole(path, "counts", v) for v in value)


def _whole(path: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"The histogram of {path} has {name}={value!r}; give whole numbers.")
    return int(value)


def load_histograms(path: str | os.PathLike[str]) -> dict[str, Histogram]:
    """Reads the JSON form (see the module's head).

    Raises:
        InputError: if the file is not JSON or holds no histograms.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); give a file with code_histograms.") from error
    sites = document.get("code_histograms") if isinstance(document, dict) else None
    if not isinstance(sites, dict) or not sites:
        raise InputError(f'{path} has no "code_histograms"; give a results.json of a quantized run.')
    return histograms(sites)


def to_json(sites: Mapping[str, Histogram]) -> dict[str, dict[str, Any]]:
    """The value of `code_histograms` in the JSON form."""
    return {
        name: {key: value for key, value in dataclasses.asdict(histogram).items() if value is not None}
        for name, histogram in sites.items()
    }
