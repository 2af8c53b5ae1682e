"""The way from a few images to quantizers: passes over the model, and the statistics of its sites."""
