"""Compares integer inference with the fake-quantized path: codes at every site, outputs, masks.

    python -m experiments.integer_check --images=coco100/val2017 --annotations=instances_val2017.json --limit=10
    python -m experiments.integer_check --artefact=runs/w4a4/quantized.safetensors
    python -m experiments.integer_check --random=vit_b --limit=1    # random weights, made-up ranges; slow

Without --artefact, MINI (or a SAM with random weights) is quantized first. Ends with code 1 if a difference is found
that the integer path should not have: a code, or a mask pixel whose logit is not within 1e-3 of the threshold.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import ahcptq_jax
from ahcptq_jax import Quantized
from ahcptq_jax.api import quantize
from ahcptq_jax.command import finish, launch, use_compilation_cache
from ahcptq_jax.flags import define_flags, values
from ahcptq_jax.runtime.integer import integer_model
from experiments import coco
from experiments.bench.made_up import random_quantized
from experiments.job.options import Options
from experiments.job.plan import calibration_set, evaluation_set
from sam_flax import CONFIGS, Sam, load_sam, preprocessing

NEAR = 1e-3  # of the mask threshold, in logits
BOXES = 8  # on each image


@dataclasses.dataclass
class Counts:
    """What was compared, summed over images."""

    images: int = 0
    sites: int = 0  # whose codes were compared
    codes: int = 0
    codes_differing: int = 0
    sites_differing: int = 0
    pixels: int = 0
    pixels_differing: int = 0
    pixels_differing_far: int = 0  # among them, farther than NEAR from the threshold
    outputs_differing: int = 0  # embeddings and logits that are not the same bits
    largest_error: float = 0.0  # of embeddings and logits, relative to the largest value


def compare(quantized: Quantized, canvas: jax.Array, boxes: jax.Array, counts: Counts, plain: bool) -> None:
    """Runs one canvas (1, S, S, 3) with boxes (N, 4) through both paths, and adds to `counts`.

    `plain` runs the programs that return no codes, too: they are compiled apart, and what a user runs.
    """
    whole = integer_model(quantized)
    first, codes = quantized.encode_with_codes(canvas)
    second, integer_codes = whole.encode_with_codes(canvas)
    sites = [(codes.pop(site), integer_codes.pop(site)) for site in list(codes)]
    (low, _), codes = quantized.decode_with_codes(first, None, boxes, None, False)
    (integer_low, _), integer_codes = whole.decode_with_codes(second, None, boxes, None, False)
    sites += [(codes[site], integer_codes[site]) for site in codes]
    counts.images += 1
    counts.sites = len(sites)
    for one, other in sites:
        different = int(np.sum(np.asarray(one) != np.asarray(other)))
        counts.codes += one.size
        counts.codes_differing += different
        counts.sites_differing += different > 0
    outputs = [(first, second), (low, integer_low)]
    if plain:
        outputs.append((quantized.encode_image(canvas), whole.encode_image(canvas)))
        prompts = (first, None, boxes, None, False)
        outputs.append((quantized.decode(*prompts)[0], whole.decode(*prompts)[0]))
    for one, other in outputs:
        difference = np.abs(np.asarray(one) - np.asarray(other))
        counts.outputs_differing += int(np.sum(difference > 0))
        counts.largest_error = max(counts.largest_error, float(difference.max() / np.abs(np.asarray(one)).max()))
    threshold = quantized.config.mask_threshold
    masks = [np.asarray(logits) > threshold for logits in (low, integer_low)]
    far = np.abs(np.asarray(low) - threshold) > NEAR
    counts.pixels += masks[0].size
    counts.pixels_differing += int(np.sum(masks[0] != masks[1]))
    counts.pixels_differing_far += int(np.sum((masks[0] != masks[1]) & far))


def model_to_check(options: Options, random: str) -> Quantized:
    """The artefact, or MINI quantized, or a SAM with random weights and made-up ranges."""
    if options.artefact:
        return ahcptq_jax.load(options.artefact)
    if random:
        sam = Sam(CONFIGS[random])
        return random_quantized(sam.config, sam.init_params(jax.random.key(options.seed)))
    sam, params = load_sam(options.checkpoint)
    return quantize(params, calibration_set(options, sam.config), options.quant_config(), sam=sam)


def check(quantized: Quantized, options: Options, plain: bool = True) -> Counts:
    """Compares both paths on the evaluation images, prompted with their annotated boxes."""
    dataset, counts = evaluation_set(options, quantized.config), Counts()
    for image, boxes in coco.prompted_images(dataset, BOXES, "compare"):
        canvas, _ = preprocessing.prepare_image(image, quantized.config)
        prompts = preprocessing.transform_of(quantized.config).apply_boxes(boxes, image.shape[:2])
        compare(quantized, jnp.asarray(canvas[None]), jnp.asarray(prompts, jnp.float32), counts, plain)
    return counts


def report(quantized: Quantized, counts: Counts) -> str:
    """The figures as lines."""
    config = quantized.quant_config
    return "\n".join(
        [
            f"W{config.w_bits}A{config.a_bits}, {counts.images} images, {BOXES} boxes each",
            f"sites: {counts.sites} of {len(quantized.activations)}",
            f"codes: {counts.codes:,} compared, {counts.codes_differing:,} differ, at {counts.sites_differing} sites",
            f"embeddings and logits: {counts.outputs_differing:,} values differ; largest difference "
            f"{counts.largest_error:.1e} of the largest value",
            f"mask pixels: {counts.pixels:,} compared, {counts.pixels_differing:,} differ, "
            f"{counts.pixels_differing_far:,} of them farther than {NEAR:g} from the threshold",
        ]
    )


def main(argv: list[str]) -> int:
    return finish(argv, _command)


def _command() -> int:
    options = Options(**values(Options))
    start = time.perf_counter()
    quantized = model_to_check(options, flags.FLAGS.random)
    counts = check(quantized, options, plain=not flags.FLAGS.random)
    print(report(quantized, counts))
    print(f"{time.perf_counter() - start:.0f} seconds")
    return 1 if counts.codes_differing or counts.pixels_differing_far else 0


FLAGS = ("checkpoint", "artefact", "images", "annotations", "num_calib", "w_bits", "a_bits", "limit", "seed")


def cli() -> None:
    """What `python -m experiments.integer_check` runs."""
    define_flags(Options, only=FLAGS)
    # Fewer images than the main job takes: every site's codes are compared.
    flags.FLAGS.set_default("num_calib", 8)
    flags.FLAGS.set_default("limit", 10)
    flags.DEFINE_enum("random", "", ["", *CONFIGS], "Quantize this SAM with random weights.")
    use_compilation_cache()
    launch(main)


if __name__ == "__main__":
    cli()
