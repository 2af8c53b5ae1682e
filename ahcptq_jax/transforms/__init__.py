"""Rewritings of floating-point parameters that come before quantization."""

from ahcptq_jax.transforms import bimodal as bimodal
from ahcptq_jax.transforms import condition as condition
from ahcptq_jax.transforms import folding as folding
from ahcptq_jax.transforms import harder as harder
from ahcptq_jax.transforms import refit as refit
from ahcptq_jax.transforms.base import Context as Context
from ahcptq_jax.transforms.base import Moments as Moments
from ahcptq_jax.transforms.base import Transform as Transform
from ahcptq_jax.transforms.base import register as register
from ahcptq_jax.transforms.base import transform_named as transform_named
