"""PAR: units of blocks up to a global one, and the objective that looks at what prompts see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ahcptq_jax import QuantConfig, ReconstructionConfig, quantize
from ahcptq_jax.architectures.base import architecture_named
from ahcptq_jax.architectures.sam_vit import SAM_VIT
from ahcptq_jax.config import METHODS
from ahcptq_jax.methods import RECONSTRUCTION_METHODS
from ahcptq_jax.reconstruction.objectives import Place, objective_named
from ahcptq_jax.reconstruction.units import encoder_units
from sam_flax.config import VIT_B, VIT_H
from sam_flax.errors import InputError
from sam_flax.mobile_sam import MobileSam
from sam_flax.sam import Sam, call


def test_stages_end_with_global_attention():
    """SAM-B has four of them (METHODS_MORE), each of three blocks; SAM-H's are of eight."""
    for config, length in ((VIT_B, 3), (VIT_H, 8)):
        units = encoder_units(Sam(config), "stage")
        assert [unit.part for unit in units] == ["encoder_stage"] * 4 + ["neck"]
        assert [len(unit.members) for unit in units[:-1]] == [length] * 4
        assert units[1].inputs == (units[0].name,) and units[-1].inputs == (units[3].name,)


@pytest.fixture(scope="module")
def place(sam_tiny):
    config, params = sam_tiny
    sam = Sam(config)
    unit = encoder_units(sam, "stage")[0]
    boxes = [np.array([[10.0, 12, 50, 60], [30, 5, 60, 60]], np.float32)] * 3
    return Place(unit, SAM_VIT, sam, params, boxes)


def test_the_loss_is_what_the_transformer_returns(place):
    """Against the definition: the neck and the decoder are run here by hand, up to the transformer's second result."""
    config, sam, params = place.sam.config, place.sam, place.params
    objective = objective_named("prompt_aware")(place, 2.0)
    assert objective.context[0].shape == (3, 1, 2, 4)
    rng = np.random.default_rng(0)
    shape = (1, config.grid, config.grid, config.embed_dim)
    output, target = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    boxes = jnp.asarray(place.boxes[0])

    @jax.jit
    def tokens(value):
        neck = SAM_VIT.neck(sam)
        embedding = call(neck.module, params["image_encoder"]["neck"], value)
        sparse, dense = call(sam, params, None, boxes, None, method="encode_prompts")
        decoder = sam.bind({"params": params}).mask_decoder
        size = config.grid
        image = embedding + dense
        image_pe = jnp.broadcast_to(sam.bind({"params": params}).prompt_encoder.get_dense_pe(), image.shape)
        own = jnp.concatenate([params["mask_decoder"]["iou_token"], params["mask_decoder"]["mask_tokens"]])
        all_tokens = jnp.concatenate([jnp.broadcast_to(own, (2, *own.shape)), sparse], axis=1)
        return decoder.transformer(image.reshape(2, size * size, -1), image_pe.reshape(2, size * size, -1), all_tokens)[
            1
        ]

    expected = np.mean(np.sum(np.square(np.asarray(tokens(output)) - np.asarray(tokens(target))), axis=-1))
    loss = jax.jit(objective.loss)
    found = loss(output, target, (boxes[None],), objective.shared)
    assert float(found) == pytest.approx(float(expected), rel=1e-4) and float(found) > 0
    assert float(loss(output, output, (boxes[None],), objective.shared)) == 0


def test_other_families_are_refused():
    with pytest.raises(InputError, match="granularity='stage' is for plain ViT encoders"):
        encoder_units(MobileSam(None), "stage")


@pytest.mark.slow
def test_the_method_learns_by_it_and_resumes_with_the_same_bits(sam_tiny, tmp_path):
    config, params = sam_tiny
    rng = np.random.default_rng(0)
    boxes = np.array([[10.0, 12, 50, 60], [30, 5, 60, 60]])
    calib = [(rng.integers(0, 256, (100, 120, 3), dtype=np.uint8), boxes) for _ in range(2)]
    method = RECONSTRUCTION_METHODS["saq_sam"]
    learning = ReconstructionConfig(**method.reconstruction, iterations=40, parts=("encoder_stage",))
    settings = QuantConfig(**METHODS["saq_sam"])
    reports = []
    options = {"sam": Sam(config), "reconstruction": learning, "state_dir": tmp_path}
    first = quantize(params, calib, settings, on_unit=reports.append, **options)
    again = quantize(params, calib, settings, **options)
    jax.tree.map(np.testing.assert_array_equal, (first.weights, first.activations), (again.weights, again.activations))
    stages = [report for report in reports if report.name.startswith("image_encoder/blocks")]
    assert len(stages) == 2 and sum(report.after < report.before for report in stages) >= 1


@pytest.mark.slow
def test_the_whole_decoder_learns_by_its_masks(sam_tiny, tmp_path):
    """One unit for all of the decoder, whose masks come nearer to floating point's; resumed with the same bits."""
    config, params = sam_tiny
    rng = np.random.default_rng(0)
    boxes = np.array([[10.0, 12, 50, 60], [30, 5, 60, 60]])
    calib = [(rng.integers(0, 256, (100, 120, 3), dtype=np.uint8), boxes) for _ in range(3)]
    learning = ReconstructionConfig(iterations=60, decoder_granularity="whole", parts=("decoder",), batch=2)
    reports = []
    options = {"sam": Sam(config), "reconstruction": learning, "state_dir": tmp_path}
    first = quantize(params, calib, QuantConfig(), on_unit=reports.append, **options)
    again = quantize(params, calib, QuantConfig(), **options)
    jax.tree.map(np.testing.assert_array_equal, (first.weights, first.activations), (again.weights, again.activations))
    (report,) = [report for report in reports if report.name == "mask_decoder"]
    assert report.after < 0.9 * report.before


def test_other_families_have_no_whole_decoder():
    with pytest.raises(InputError, match="decoder_granularity='whole' is not for sam2; use part"):
        architecture_named("sam2").whole_decoder(None)
    with pytest.raises(InputError, match="name decoder among the parts"):
        ReconstructionConfig(decoder_granularity="whole", parts=("decoder_mlp",))
