"""The kinds of quantizers, each in a file of its own; see `registry` for what a kind says.

A new kind is a file that defines a quantizer class and registers a `Kind`. The built-in ones are registered here.
"""

from ahcptq_jax.quantizers.kinds import grouped, hybrid, log2, log_nonlinear, uniform
from ahcptq_jax.quantizers.kinds.registry import GRID_BITS as GRID_BITS
from ahcptq_jax.quantizers.kinds.registry import ChannelGroups as ChannelGroups
from ahcptq_jax.quantizers.kinds.registry import Kind as Kind
from ahcptq_jax.quantizers.kinds.registry import Levels as Levels
from ahcptq_jax.quantizers.kinds.registry import Observation as Observation
from ahcptq_jax.quantizers.kinds.registry import Statistic as Statistic
from ahcptq_jax.quantizers.kinds.registry import kind_named as kind_named
from ahcptq_jax.quantizers.kinds.registry import kind_names as kind_names
from ahcptq_jax.quantizers.kinds.registry import kind_of as kind_of
from ahcptq_jax.quantizers.kinds.registry import register as register

for _kind in (uniform.KIND, grouped.KIND, log2.KIND, hybrid.KIND, log_nonlinear.KIND):
    register(_kind)
