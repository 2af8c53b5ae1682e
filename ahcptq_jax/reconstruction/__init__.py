"""Block reconstruction: the learning of rounding and of scales, unit after unit."""
