"""AHCPTQ in JAX: post-training quantization of Segment Anything as functions over parameter pytrees."""

from ahcptq_jax.api import quantize as quantize
from ahcptq_jax.api import quantize_reconstructed as quantize_reconstructed
from ahcptq_jax.calibration.sources import ImageFolder as ImageFolder
from ahcptq_jax.config import METHODS as METHODS
from ahcptq_jax.config import W4A4 as W4A4
from ahcptq_jax.config import W5A5 as W5A5
from ahcptq_jax.config import W6A6 as W6A6
from ahcptq_jax.config import QuantConfig as QuantConfig
from ahcptq_jax.formats.artefact import load as load
from ahcptq_jax.formats.artefact import save as save
from ahcptq_jax.formats.summary import summarize as summarize
from ahcptq_jax.reconstruction.config import ReconstructionConfig as ReconstructionConfig
from ahcptq_jax.rules import Rule as Rule
from ahcptq_jax.runtime.quantized import Quantized as Quantized

__version__ = "0.1.0"
