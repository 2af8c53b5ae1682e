"""What to quantize to, and which parts of the method are on."""

import dataclasses
from typing import Any

import numpy as np

from ahcptq_jax.quantizers.base import MAX_BITS, MIN_BITS

# Type of a field's default -> what it accepts, and how to say so.
_ACCEPTED: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int, np.integer), "a whole number"),
    float: ((int, float, np.integer, np.floating), "a number"),
    bool: ((bool,), "True or False"),
    str: ((str,), "a text"),
    tuple: ((tuple,), "a tuple"),
    type(None): ((int, float, np.integer, np.floating, type(None)), "a number, or None"),
}


def check_types(record: Any) -> None:
    """Raises ValueError if a field of a dataclass has another type than its default; see `_ACCEPTED`."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        accepted, kind = _ACCEPTED[type(field.default)]
        # bool is an int to Python, and bits=True a mistake.
        if not isinstance(value, accepted) or (bool not in accepted and isinstance(value, bool)):
            raise ValueError(f"{field.name}={value!r} must be {kind}.")


# How per-tensor ranges of activations are found.
ACT_RANGES = ("minmax", "percentile", "mse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """A quantization recipe's switches. Hashable, so that it can be a static argument of `jax.jit`.

    Raises:
        ValueError: if a bit width is outside 2..8 or a switch has an unknown value.
    """

    w_bits: int = 4  # weights, per output channel
    a_bits: int = 4  # activations
    hluq: bool = True  # hybrid log-uniform inputs of every MLP's second linear; else uniform
    cag: bool = True  # channel groups for inputs of projections and first linears; else per tensor
    big: bool = True  # sign flips that make bimodal keys unimodal
    agq: bool = True  # log2 softmax with adaptive granularity; else uniform
    groups: int = 4  # CAG groups G; 0 keeps every channel on its own
    group_metric: str = "range"  # what CAG clusters and a group shares: "paper", "normalized" or "range" (grouping)
    # A uniform step that reaches the observed maximum instead of the paper's, which stays below it.
    hluq_reach_maximum: bool = False
    hluq_fine: bool = False  # search HLUQ's breakpoint on a finer grid than the paper's 9 pairs
    act_range: str = "minmax"  # per-tensor ranges of activations: "minmax", "percentile" or "mse", the latter by loss
    weight_search: bool = True  # 2-D range search; else the plain minimum and maximum
    hluq_rows: int = 2048  # rows (tokens) per image in HLUQ's breakpoint search; 0 uses all of them
    softmax_rows: int = 512  # queries per head in the softmax search; 0 uses all of them
    prompts_per_image: int = 8  # boxes per calibration image shown to the decoder
    seed: int = 0  # of the row and prompt subsampling

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("w_bits", "a_bits"):
            if not MIN_BITS <= getattr(self, name) <= MAX_BITS:
                raise ValueError(f"{name}={getattr(self, name)} must be a width from {MIN_BITS} to {MAX_BITS} bits.")
        if self.groups < 0:
            raise ValueError(f"groups={self.groups} must be 0 (every channel on its own) or a positive number.")
        if self.group_metric not in ("paper", "normalized", "range"):
            raise ValueError(f"group_metric={self.group_metric!r} must be 'paper', 'normalized' or 'range'.")
        if self.act_range not in ACT_RANGES:
            raise ValueError(f"act_range={self.act_range!r} must be 'minmax', 'percentile' or 'mse'.")
        if self.prompts_per_image < 1 or min(self.softmax_rows, self.hluq_rows) < 0:
            raise ValueError(
                f"prompts_per_image={self.prompts_per_image} must be at least 1, and "
                f"softmax_rows={self.softmax_rows} and hluq_rows={self.hluq_rows} at least 0."
            )
        if not 0 <= self.seed < 2**31 - 1:
            raise ValueError(f"seed={self.seed} must be a number from 0 to {2**31 - 2}.")


W4A4 = QuantConfig(w_bits=4, a_bits=4)
W5A5 = QuantConfig(w_bits=5, a_bits=5)
W6A6 = QuantConfig(w_bits=6, a_bits=6)

_UNIFORM = {"hluq": False, "cag": False, "big": False, "agq": False}
# Each method's quantizers, as a record of switches over one code path. `methods.RECONSTRUCTION_METHODS` says how the
# last five learn; the first four take statistics alone.
METHODS: dict[str, dict] = {
    "minmax": {**_UNIFORM, "weight_search": False},
    "percentile": {**_UNIFORM, "weight_search": False, "act_range": "percentile"},
    "omse": {**_UNIFORM, "act_range": "mse"},
    "ptq4sam_s": {"hluq": False, "cag": False},
    "adaround": _UNIFORM,
    "brecq": _UNIFORM,
    "qdrop": _UNIFORM,
    "ptq4sam_l": {"hluq": False, "cag": False},
    "ahcptq": {},
}
