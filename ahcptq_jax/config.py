"""What to quantize to, and which parts of the method are on."""

import dataclasses

from ahcptq_jax.quantizers.base import check_bits


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
    group_metric: str = "normalized"  # k-means metric: "paper" (raw scale, zero point) or "normalized"
    # A uniform step that reaches the observed maximum instead of the paper's (METHOD 7).
    hluq_reach_maximum: bool = False
    weight_search: bool = True  # 2-D range search; else the plain minimum and maximum
    softmax_rows: int = 512  # queries per head in the softmax search; 0 uses all of them
    prompts_per_image: int = 8  # boxes per calibration image shown to the decoder
    seed: int = 0  # of the row and prompt subsampling

    def __post_init__(self) -> None:
        check_bits(self.w_bits)
        check_bits(self.a_bits)
        if self.groups < 0:
            raise ValueError(f"groups={self.groups} must be 0 (every channel on its own) or a positive number.")
        if self.group_metric not in ("paper", "normalized"):
            raise ValueError(f"group_metric={self.group_metric!r} must be 'paper' or 'normalized'.")
        if self.prompts_per_image < 1 or self.softmax_rows < 0:
            raise ValueError("prompts_per_image must be at least 1 and softmax_rows at least 0.")


W4A4 = QuantConfig(w_bits=4, a_bits=4)
W5A5 = QuantConfig(w_bits=5, a_bits=5)
W6A6 = QuantConfig(w_bits=6, a_bits=6)

# Each method is a record of switches over one code path. Those named after papers take their quantizers with
# statistics alone, without reconstruction.
METHODS: dict[str, dict] = {
    "ahcptq": {},
    "ptq4sam_s": {"hluq": False, "cag": False},
    "minmax": {"hluq": False, "cag": False, "big": False, "agq": False, "weight_search": False},
}
