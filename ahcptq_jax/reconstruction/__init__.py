"""Block reconstruction: the learning of rounding and of scales, unit after unit."""

from ahcptq_jax.reconstruction import prompt_aware as prompt_aware
