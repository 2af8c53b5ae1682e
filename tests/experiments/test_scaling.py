"""The plan for many devices: what it counts is what a run sums and sends."""

import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.architectures.sites import flatten, unflatten
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.reconstruction import learning
from ahcptq_jax.reconstruction.config import ReconstructionConfig
from experiments import scaling
from experiments.bench.made_up import random_quantized
from sam_flax import Sam
from sam_flax.files.convert import convert

RATES = scaling.Rates(tflops=25.0, step=3.5, link=1e6, latency=0.0)


@pytest.fixture(scope="module")
def tiny():
    with np.load("tests/data/sam_tiny_weights_s0.npz") as file:
        return convert(dict(file), decoder_num_heads=4)


@pytest.fixture(scope="module")
def counts(tiny):
    return scaling.unit_counts(Sam(tiny[0]), QuantConfig())


def test_gradients_are_counted_as_they_are_summed(tiny, counts):
    config, params = tiny
    sam = Sam(config)
    quantized, settings = random_quantized(config, params, QuantConfig(groups=0)), ReconstructionConfig()
    architecture, flat = architecture_of(sam), flatten(params)
    units = [*architecture.encoder_units(sam), *architecture.decoder_units(sam)]
    assert [unit.name for unit in units] == [count.name for count in counts]
    for unit, count in zip(units, counts, strict=True):
        own = unit.own(quantized.weights), unit.own(quantized.activations)
        _, state = learning.start(unflatten(unit.own(flat)), *own, settings)
        # Together with the two losses.
        assert count.vector == ravel_pytree(learning.learned(state, settings))[0].size + 2, unit.name


def test_a_row_is_what_an_mlp_takes_and_returns(tiny, counts):
    config = tiny[0]
    (mlp,) = (count for count in counts if count.name == "image_encoder/blocks_0/mlp")
    assert mlp.row == 3 * 4 * config.grid**2 * config.embed_dim
    hidden = 4 * config.embed_dim
    products = 4 * config.grid**2 * config.embed_dim * hidden
    assert products <= mlp.operations < 1.5 * products  # what is not a product weighs more in so small a model


def test_what_more_devices_change(tiny, counts):
    sam = Sam(tiny[0])
    one, eight, many = (scaling.plan(sam, counts, n, 32, 100, RATES) for n in (1, 8, 64))
    assert one.sent == one.exchange == 0
    assert one.memory > eight.memory > many.memory
    # A sum in parts costs each device less than two vectors, however many there are.
    vectors = sum(100 * 4 * count.vector for count in counts) / 2**30
    assert 1.7 * vectors < eight.sent < many.sent < 2.1 * vectors
    assert eight.divided < one.learning < eight.learning
    assert scaling.sent_in_a_step(10, 2) == 2 * 4 * 5


def test_statistics_are_small(tiny):
    assert 1000 < scaling.statistics_bytes(Sam(tiny[0]), QuantConfig()) < 20_000
