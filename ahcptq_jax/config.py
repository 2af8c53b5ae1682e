"""What to quantize to, and which parts of the method are on."""

import dataclasses
import re
from typing import Any

from ahcptq_jax.rules import Rule
from ahcptq_jax.settings import Check, at_least, between, check_settings, setting
from sam_flax.errors import InputError

# Widths of codes that the quantizers, the packing and the products are made for.
MIN_BITS, MAX_BITS = 2, 8
# How per-tensor ranges of activations are found.
ACT_RANGES = ("minmax", "percentile", "mse")
# Widths of levels on the integer grid.
GRIDS = (5, 6, 7, 8)
# What CAG's k-means sees of a channel, see `quantizers.searches.grouping`.
GROUP_METRICS = ("paper", "normalized", "range")

_WIDTH = Check(lambda bits: MIN_BITS <= bits <= MAX_BITS, f"a width from {MIN_BITS} to {MAX_BITS} bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """A quantization recipe's switches. Hashable, so that it can be a static argument of `jax.jit`.

    Raises:
        InputError: if a bit width is outside 2..8 or a switch has an unknown value.
    """

    w_bits: int = setting(4, "Bits of weights, 2 to 8.", check=_WIDTH)
    a_bits: int = setting(4, "Bits of activations, 2 to 8.", check=_WIDTH)
    hluq: bool = setting(True, "Hybrid log-uniform inputs of every MLP's second linear; else uniform.")
    cag: bool = setting(True, "Channel groups for inputs of projections and first linears; else one scale a tensor.")
    big: bool = setting(True, "Sign flips that make bimodal keys unimodal.")
    agq: bool = setting(True, "Log2 softmax with adaptive granularity; else uniform.")
    lnq: bool = setting(False, "Log-nonlinear softmax codes (AHCQ-SAM) in the place of log2 or uniform ones.")
    acnr: bool = setting(False, "Smaller condition numbers of linears before they are quantized (AHCQ-SAM).")
    refit: bool = setting(False, "Least-norm refit of linears to what they see before they are quantized (Q-SAM2).")
    pcc: bool = setting(False, "Ranges of the decoder's queries and keys by what attention focuses on (SAQ-SAM).")
    budget: str = setting(
        "",
        "Widths by layer for what this uniform width would cost: bytes:3.5 of weights, or bitops:3.5; bitops alone for "
        "the cost of w_bits and a_bits.",
        check=Check(
            lambda text: not text or re.fullmatch(r"\w+(:\d+(\.\d+)?)?", text) is not None,
            "empty, or what is counted, perhaps with a colon and a width, such as bytes:3.5",
        ),
    )
    groups: int = setting(
        4,
        "CAG's groups of channels; 0 keeps every channel on its own.",
        check=Check(lambda groups: groups >= 0, "0 (every channel on its own) or a positive number"),
    )
    group_metric: str = setting("range", "What CAG's k-means sees of a channel.", choices=GROUP_METRICS)
    hluq_reach_maximum: bool = setting(
        False, "HLUQ's uniform step reaches the observed maximum; the paper's stays below it."
    )
    hluq_fine: bool = setting(False, "Search HLUQ's breakpoint on a finer grid than the paper's 9 pairs.")
    act_range: str = setting(
        "minmax", "How per-tensor ranges of activations are found; mse is by loss.", choices=ACT_RANGES
    )
    grid_bits: int = setting(
        8,
        "Bits of the whole levels that all activations are put on; 0 leaves the paper's form.",
        check=Check(lambda bits: bits in (0, *GRIDS), f"0 or one of {', '.join(map(str, GRIDS))}"),
    )
    weight_search: bool = setting(True, "Search the ranges of weights; else their plain minimum and maximum.")
    hluq_rows: int = setting(
        2048, "Tokens per image in the search of HLUQ's breakpoint; 0 takes all.", check=at_least(0)
    )
    softmax_rows: int = setting(512, "Queries per head in the softmax search; 0 takes all.", check=at_least(0))
    prompts_per_image: int = setting(8, "Boxes per calibration image shown to the decoder.", check=at_least(1))
    seed: int = setting(0, "Seed of the choice of rows and prompts.", check=between(0, 2**31 - 2), sweep=False)

    # The user's own rules, which come before the architecture's; a rule as a dict of its fields is taken, too.
    rules: tuple[Rule, ...] = ()
    # Names of rewritings of the parameters before `big`'s, such as "harder:1"; see `transforms`.
    transforms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "rules", _as_rules(self.rules))
        if not isinstance(self.transforms, tuple | list) or not all(isinstance(t, str) for t in self.transforms):
            raise InputError(f"transforms={self.transforms!r} must be a tuple of names, such as ('harder:1',).")
        object.__setattr__(self, "transforms", tuple(self.transforms))


def _as_rules(values: Any) -> tuple[Rule, ...]:
    """Checked rules of a configuration.

    Raises:
        InputError: if one is no rule, or has a width that no code can have.
    """
    if not isinstance(values, tuple | list):
        raise InputError(f"rules={values!r} must be a tuple of ahcptq_jax.Rule.")
    rules = []
    for value in values:
        try:
            rule = value if isinstance(value, Rule) else Rule(**value)
        except TypeError:
            raise InputError(f"rules has {value!r}, which is no ahcptq_jax.Rule.") from None
        for name in ("a_bits", "w_bits"):
            bits = getattr(rule, name)
            if bits is not None and (not isinstance(bits, int) or isinstance(bits, bool) or not _WIDTH.accepts(bits)):
                raise InputError(f"The rule {rule.pattern!r} has {name}={bits!r}, which must be {_WIDTH.wanted}.")
        rules.append(rule)
    return tuple(rules)


W4A4 = QuantConfig(w_bits=4, a_bits=4)
W5A5 = QuantConfig(w_bits=5, a_bits=5)
W6A6 = QuantConfig(w_bits=6, a_bits=6)

_UNIFORM = {"hluq": False, "cag": False, "big": False, "agq": False}
# Each method's quantizers, as a record of switches over one code path. `methods.RECONSTRUCTION_METHODS` says how the
# last eight learn; the first four take statistics alone.
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
    "ahcptq_mixed": {"budget": "bitops"},
    "saq_sam": {"hluq": False, "cag": False, "act_range": "mse", "pcc": True},
    "ahcq_sam": {"lnq": True, "acnr": True},
}
