"""Trains MINI, the small SAM that ships, on photographs with segments and on generated scenes.

    python -m experiments.train_mini --out=runs/mini --photos=photos --coco=coco100

Three phases, because a box prompt alone already predicts a blob and lets a network ignore the image: dense training
of the encoder, a short one of the decoder, then everything (`experiments/mini/schedule.py`). Run it again with the
same flags to go on after an interruption. Writes to `--out`: `state.npz` (to resume), `curve.jsonl` (losses, and IoU of
held-back photographs and scenes), `mini.safetensors`.
"""

import os
from pathlib import Path

from absl import flags

from ahcptq_jax.command import finish, launch
from experiments.mini.atlas import AtlasSettings, build_atlas
from experiments.mini.augment import BatchSettings
from experiments.mini.folders import find_folders, list_records
from experiments.mini.losses import LossWeights
from experiments.mini.models import MODELS
from experiments.mini.schedule import Schedule
from experiments.mini.teacher import load_teacher
from experiments.mini.train import RunSettings, train
from experiments.mini.views import ViewSettings
from sam_flax.config import SegmenterConfig
from sam_flax.errors import InputError
from sam_flax.files.checkpoint import load_params

FLAGS = flags.FLAGS


def parse_weights(text: str) -> tuple[tuple[str, float], ...]:
    """`name=weight,name=weight` as pairs.

    Raises:
        InputError: if it is not of that form.
    """
    pairs = []
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition("=")
        try:
            pairs.append((name, float(weight)))
        except ValueError:
            raise InputError(f"--source_weights has {part!r}; write name=weight, separated by commas.") from None
    return tuple(pairs)


def batch_settings(config: SegmenterConfig) -> BatchSettings:
    """What the flags say of a batch."""
    low, high = (float(v) for v in FLAGS.object_sizes)
    views = ViewSettings(
        canvas=config.img_size,
        prompts=FLAGS.prompts,
        object_sizes=(low, high),
        paste_sizes=(low + 0.01, min(high, 0.6)),
        smallest_fit=FLAGS.smallest_fit,
        small_bias=FLAGS.small_bias,
        smallest_box=(FLAGS.smallest_box / 2, FLAGS.smallest_box),
    )
    return BatchSettings(
        batch=FLAGS.batch,
        cells=config.mask_size,
        pad=config.pixel_mean,  # zero after normalisation
        views=views,
        point_share=FLAGS.point_share,
        exact_box_share=FLAGS.exact_box_share,
        smallest=FLAGS.smallest_box**2 / 4,
    )


def work() -> int:
    """Trains as the flags say."""
    sam = MODELS[FLAGS.config]
    config = sam.config
    start = load_params(FLAGS.start)[1] if FLAGS.start else None
    teacher = load_teacher(FLAGS.teacher, sam) if FLAGS.teacher else None
    weights = parse_weights(FLAGS.source_weights)
    folders = find_folders(FLAGS.photos, FLAGS.coco)
    # The photographs of --coco are all trained on: it comes with a validation half of its own.
    divided = [r for f in folders if f.source == "photos" for r in list_records(f)]
    whole = [r for f in folders if f.source != "photos" for r in list_records(f)]
    settings = AtlasSettings(scenes=FLAGS.scenes, scene_size=config.img_size)
    atlas, sources = build_atlas(divided, whole, settings, os.cpu_count() or 1)
    batches = batch_settings(config)
    schedule = Schedule(
        pretrain_steps=FLAGS.pretrain_steps,
        warm_steps=FLAGS.warm_steps,
        joint_steps=FLAGS.joint_steps,
        encoder_rate=FLAGS.rate,
        decoder_rate=FLAGS.rate,
        frozen_encoder=FLAGS.frozen_encoder,
    )
    run = RunSettings(
        seed=FLAGS.seed,
        scene_share=FLAGS.scene_share,
        source_weights=weights,
        precision=FLAGS.precision,
        log_every=FLAGS.log_every,
        eval_every=FLAGS.eval_every,
        save_minutes=FLAGS.save_minutes,
        minutes=FLAGS.minutes,
        losses=LossWeights(dice=FLAGS.dice, dense=FLAGS.dense, second=FLAGS.second),
    )
    train(Path(FLAGS.out), sam, schedule, batches, run, atlas, sources, start, teacher)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/mini", "Folder for the state, the curve and the weights.")
    flags.DEFINE_enum("config", "mini", sorted(MODELS), "The model to train.")
    flags.DEFINE_string("photos", "", "Folder with images/ and segments.json, whose images may name a `source`.")
    flags.DEFINE_string("coco", "", "Folder with train2017/ and annotations/*train2017.json.")
    flags.DEFINE_string("start", "", "Weights to start from instead of random ones.")
    flags.DEFINE_string(
        "teacher", "", "Weights whose heads are started from, and whose embeddings the encoder learns to make."
    )
    flags.DEFINE_integer("seed", 0, "Seed of the initial weights and of the batches.")
    flags.DEFINE_integer("scenes", 6000, "Generated training scenes.")
    flags.DEFINE_float("scene_share", 0.25, "Share of the images that are scenes.")
    flags.DEFINE_string(
        "source_weights",
        "bsds500=3,coco_train2017=4,coco=4,ccp=0.4,labelmefacade=0.4",
        "How often photographs are shown, by source; 1 where none is given.",
    )
    flags.DEFINE_integer("batch", 64, "Images of a step.")
    flags.DEFINE_integer("prompts", 8, "Objects asked for in each.")
    flags.DEFINE_integer("pretrain_steps", 600, "Steps of dense encoder training.")
    flags.DEFINE_integer("warm_steps", 150, "Steps of the decoder on resting features.")
    flags.DEFINE_integer("joint_steps", 6000, "Steps of joint training.")
    flags.DEFINE_float("rate", 1e-3, "Peak learning rate of the joint phase.")
    flags.DEFINE_float(
        "minutes", 0.0, "Minutes of training, compiling included, instead of --joint_steps; 0: by steps."
    )
    flags.DEFINE_bool("frozen_encoder", False, "Leave the image encoder as it is.")
    flags.DEFINE_list("object_sizes", ["0.03", "0.9"], "Least and largest object, as shares of the canvas.")
    flags.DEFINE_float("smallest_fit", 0.7, "Least scale of an image, as a share of the one that fits it in.")
    flags.DEFINE_float("smallest_box", 5.0, "Least longer side of an object, pixels of the canvas.")
    flags.DEFINE_float("small_bias", 0.0, "Power by which small objects are asked for more often.")
    flags.DEFINE_float("point_share", 0.25, "Objects prompted by a point instead of a box.")
    flags.DEFINE_float("exact_box_share", 0.5, "Boxes that are not jittered.")
    flags.DEFINE_float("dice", 1.0, "Weight of the dice loss.")
    flags.DEFINE_float("dense", 0.4, "Weight of the dense loss, whose head starts anew with --start.")
    flags.DEFINE_float("second", 0.5, "Weight of the round after a click; 0: without that round.")
    flags.DEFINE_enum("precision", "bfloat16", ["bfloat16", "float32"], "Of the forward pass in training.")
    flags.DEFINE_integer("log_every", 100, "Steps between lines of the curve.")
    flags.DEFINE_integer("eval_every", 1000, "Steps between its scores; 0: none.")
    flags.DEFINE_float("save_minutes", 1.0, "Minutes between saved states.")
    launch(lambda argv: finish(argv, work, lambda: f"the last state in {FLAGS.out} is kept."))
