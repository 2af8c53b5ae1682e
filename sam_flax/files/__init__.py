"""Files of parameters: anybody's checkpoints, our own, and the names in them."""
