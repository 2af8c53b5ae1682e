"""AHCPTQ in JAX: post-training quantization of Segment Anything as functions over parameter pytrees."""

from ahcptq_jax.artefact import load as load
from ahcptq_jax.config import METHODS as METHODS
from ahcptq_jax.config import W4A4 as W4A4
from ahcptq_jax.config import W5A5 as W5A5
from ahcptq_jax.config import W6A6 as W6A6
from ahcptq_jax.config import QuantConfig as QuantConfig
from ahcptq_jax.learning import ReconstructionConfig as ReconstructionConfig
from ahcptq_jax.quantize import quantize as quantize
from ahcptq_jax.quantized import Quantized as Quantized
from ahcptq_jax.reconstruct import quantize_reconstructed as quantize_reconstructed

__version__ = "0.1.0"
