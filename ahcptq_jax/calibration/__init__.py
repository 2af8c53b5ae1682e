"""From a few images to quantizers: passes over the model, statistics of sites, searches."""
