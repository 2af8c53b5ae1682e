"""What quantization must know of a model: one file for each family of models, and their registry."""

from ahcptq_jax.architectures import mobile_sam as mobile_sam
from ahcptq_jax.architectures import sam2 as sam2
from ahcptq_jax.architectures import sam_vit as sam_vit
from ahcptq_jax.architectures.base import Architecture as Architecture
from ahcptq_jax.architectures.base import architecture_named as architecture_named
from ahcptq_jax.architectures.base import architecture_of as architecture_of
from ahcptq_jax.architectures.base import known_architectures as known_architectures
from ahcptq_jax.architectures.base import module_of as module_of
from ahcptq_jax.architectures.base import register as register
