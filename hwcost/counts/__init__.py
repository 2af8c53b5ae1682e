"""Counts of operations and bytes of every layer of a model."""
