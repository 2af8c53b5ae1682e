"""The settings of the reconstruction."""

import dataclasses
import math

from ahcptq_jax.architectures.base import DECODER_GRANULARITIES, GRANULARITIES, PARTS
from ahcptq_jax.settings import at_least, between, check_settings, finite_from, setting
from sam_flax.errors import InputError

# Shares of the iterations after which channels are grouped into 8G, 4G, 2G and G (paper, section on CAG).
REGROUP_AT = (0.2, 0.4, 0.6, 0.8)

PAPER_ITERATIONS = 20000
PAPER_ROUNDING_RATE = 1e-3
PAPER_SCALE_RATE = 4e-5
RELATIVE_SCALE_RATE = 1e-4
MOST_SCALE_RATE = 0.05


# What the encoder's blocks become at each granularity.
_MADE = {"part": {"encoder_attention", "encoder_mlp"}, "block": {"encoder_block"}, "stage": {"encoder_stage"}}
_MADE_OF_DECODER = {"part": {"decoder_attention", "decoder_mlp"}, "whole": {"decoder"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Switches and numbers of the reconstruction; the defaults are the paper's but for the steps of the scales.

    Learning rates that are not given depend on the number of iterations, so that few of them travel as far as the
    paper's 20000. Its rounding rate grows by the square root of how many times fewer there are (noisy gradients, whose
    steps add up like a random walk), its scale rate in proportion (scales move one way). A scale's step is relative to
    the scale by default, where 1e-4 takes the place of the paper's 4e-5, which is 1e-4 of a scale of 0.4: on MINI at
    200 iterations masks agree more with floating point than with absolute steps of any size that was tried.
    200 iterations: 1e-2 and 1e-2.

    Raises:
        InputError: if a number is out of its range, or the switches contradict each other.
    """

    iterations: int = setting(PAPER_ITERATIONS, "Iterations for each unit.", check=at_least(0))
    batch: int = setting(1, "Images per iteration.", check=at_least(1))
    learn_rounding: bool = setting(True, "AdaRound; else weights stay rounded to nearest.")
    learn_scales: bool = setting(True, "Learn the scales of activations (LSQ).")
    rounding_rate: float | None = setting(
        None, "Learning rate of the rounding, constant; default: by the iterations.", type=float, check=finite_from(0)
    )
    scale_rate: float | None = setting(
        None,
        "Learning rate of activation scales, with cosine decay to 0; default: by the iterations.",
        type=float,
        check=finite_from(0),
    )
    relative_steps: bool = setting(True, "Steps of scales in proportion to the scale; the official ones are absolute.")
    input_drop: float = setting(
        0.5, "QDrop: share of a unit's input that is taken from the floating-point model.", check=between(0, 1)
    )
    activation_drop: float = setting(
        0.5, "QDrop: share of every activation inside a unit that passes unquantized.", check=between(0, 1)
    )
    granularity: str = setting(
        "part",
        "What is learned together in the encoder: parts of blocks, blocks whole, or blocks up to a global one.",
        choices=GRANULARITIES,
    )
    decoder_granularity: str = setting(
        "part",
        "What is learned together in the decoder: each attention and MLP, or all of it by the masks that it makes.",
        choices=DECODER_GRANULARITIES,
    )
    objective: str = setting("local", "What a unit's learning minimises; see `reconstruction.objectives`.")
    loss_power: float = setting(2.0, "Power of the errors of a unit's output; the paper's is 2.", check=finite_from(1))
    rounding_weight: float = setting(0.01, "Weight of the regularizer, once warm.", check=finite_from(0))
    warmup: float = setting(0.2, "Share of the iterations without regularizer.", check=between(0, 1))
    beta_start: float = setting(20.0, "The regularizer's exponent after the warm-up, from where it falls linearly.")
    beta_end: float = setting(2.0, "The regularizer's exponent at the end.")
    parts: tuple[str, ...] = setting(PARTS, "What is reconstructed; the rest keeps its calibration.", sweep=False)
    seed: int = setting(0, "Seed of batches and drops.", check=at_least(0), sweep=False)
    # What follows has no influence on the result.
    chunk: int = setting(50, "Iterations per call of the compiled function.", check=at_least(1), sweep=False)
    memory_budget: int = setting(
        4 * 2**30,
        "Bytes of cached inputs and outputs held in memory; more go to disk.",
        check=at_least(0),
        sweep=False,
    )
    save_seconds: float = setting(300.0, "Seconds between saves inside a unit.", check=finite_from(0), sweep=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if not 1 <= self.beta_end <= self.beta_start:
            raise InputError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must fall, to 1 at least.")
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise InputError(f"parts has {unknown[0]!r}; choose of {', '.join(PARTS)}.")
        for name, table, what in (
            ("granularity", _MADE, "encoder's blocks"),
            ("decoder_granularity", _MADE_OF_DECODER, "decoder"),
        ):
            value, chosen = getattr(self, name), set(self.parts)
            made = table[value]
            if chosen & set().union(*table.values()) and not made & chosen:
                raise InputError(
                    f"parts={self.parts} and {name}={value!r} leave the {what} as they are; name "
                    f"{' or '.join(sorted(made))} among the parts."
                )

    def rates(self) -> tuple[float, float]:
        """Learning rates of rounding and of scales."""
        fewer = PAPER_ITERATIONS / max(self.iterations, 1)
        rounding = PAPER_ROUNDING_RATE * math.sqrt(fewer) if self.rounding_rate is None else self.rounding_rate
        if self.scale_rate is not None:
            return rounding, self.scale_rate
        return rounding, min(
            (RELATIVE_SCALE_RATE if self.relative_steps else PAPER_SCALE_RATE) * fewer, MOST_SCALE_RATE
        )

    def result_settings(self) -> "ReconstructionConfig":
        """Itself with defaults for what has no influence on the result; equal settings give equal results."""
        default = ReconstructionConfig()
        same = {name: getattr(default, name) for name in ("chunk", "memory_budget", "save_seconds")}
        return dataclasses.replace(self, **same)

    def regroup_steps(self) -> tuple[int, ...]:
        """The iteration before which each rung of the ladder is taken."""
        return tuple(int(share * self.iterations) for share in REGROUP_AT)
