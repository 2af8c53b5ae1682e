"""Quantization methods with reconstruction, each a record of switches over one code path.

The baselines named after papers share our calibration, our units and our corrections, and so differ from one another in
the switches below only. They are not the papers' own programs: BRECQ's first learns rounding on
unquantized activations and then their scales, where ours learns both at once, which is QDrop without drops; AdaRound's
lets a layer see the quantized ones before it, where ours sees floating-point inputs.
"""

import dataclasses
from typing import Any

from ahcptq_jax.config import METHODS, QuantConfig
from ahcptq_jax.reconstruction.config import ReconstructionConfig

_NO_DROP = {"input_drop": 0.0, "activation_drop": 0.0}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as it differs from the defaults of the two configurations.

    Attributes:
        quantization: fields of `QuantConfig`.
        reconstruction: fields of `ReconstructionConfig`.
    """

    quantization: dict[str, Any] = dataclasses.field(default_factory=dict)
    reconstruction: dict[str, Any] = dataclasses.field(default_factory=dict)

    def quant_config(self, **overrides: Any) -> QuantConfig:
        """The configuration of the method's quantizers; `overrides` (bits, seed, ablations) replace its fields."""
        return QuantConfig(**(self.quantization | overrides))

    def reconstruction_config(self, **overrides: Any) -> ReconstructionConfig:
        """The configuration of the method's reconstruction; `overrides` (iterations, seed) replace its fields."""
        return ReconstructionConfig(**(self.reconstruction | overrides))


RECONSTRUCTION_METHODS: dict[str, Method] = {
    # Weights alone are learned; meanwhile neither inputs nor activations are quantized.
    "adaround": Method(METHODS["adaround"], {"learn_scales": False, "input_drop": 1.0, "activation_drop": 1.0}),
    # Block by block on quantized inputs, activation scales learned with the rounding (arXiv 2102.05426).
    "brecq": Method(METHODS["brecq"], _NO_DROP),
    "qdrop": Method(METHODS["qdrop"]),
    "ptq4sam_l": Method(METHODS["ptq4sam_l"]),
    "ahcptq": Method(METHODS["ahcptq"]),
    # The same with widths by layer and site, for the bit operations of the uniform ones.
    "ahcptq_mixed": Method(METHODS["ahcptq_mixed"]),
    "ahcq_sam": Method(METHODS["ahcq_sam"]),
    # Blocks up to a global one together, by what prompts see of them. Its two halves switch off alone: -pcc, and
    # +objective=local with +granularity=part.
    "saq_sam": Method(METHODS["saq_sam"], {"granularity": "stage", "objective": "prompt_aware"}),
}
