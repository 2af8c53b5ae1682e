"""A sheet of pictures with what was true, what a SAM in floating point says, and what it says quantized.

    python -m experiments.mini.sheet --artefact=runs/w4a4/quantized.safetensors --count=6 --out=sheet.png
    python -m experiments.mini.sheet --images=coco100/val2017 --annotations=coco100/annotations/instances_val2017.json \
        --artefact=runs/w4a4/quantized.safetensors --count=24 --out=sheet.png

Each picture, a held-out generated scene or a photograph, is shown four times: boxes, true masks, floating point,
quantized. A sheet of photographs holds parts of them: it is for looking, not for publishing.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from ahcptq_jax.command import finish
from experiments.coco import CocoDataset, load_boxes
from experiments.coco.masks import decode
from experiments.evaluate.predictions import predict_image
from experiments.job.options import Options
from experiments.job.plan import evaluation_set
from experiments.mini.evaluate import load_model
from experiments.report.examples import Example
from experiments.report.pictures import draw_masks, draw_prompts
from sam_flax import SamPredictor
from sam_flax.predictor import MaskModel

WIDTH, HEIGHT = 240, 200  # of a picture on the sheet


def place(picture: Image.Image) -> np.ndarray:
    """A picture in its field, (HEIGHT, WIDTH, 3)."""
    field = Image.new("RGB", (WIDTH, HEIGHT), "white")
    picture.thumbnail((WIDTH - 4, HEIGHT - 4))
    field.paste(picture, ((WIDTH - picture.width) // 2, (HEIGHT - picture.height) // 2))
    return np.asarray(field)


def make_sheet(dataset: CocoDataset, models: Sequence[MaskModel], count: int, across: int) -> Image.Image:
    """The sheet of the first `count` pictures with objects, `across` in a row, with their eight largest objects."""
    boxes = load_boxes("gt", dataset)
    shown = [item for item in dataset.items if len(boxes.per_image[item.image_id])][:count]
    predictors = [SamPredictor(model) for model in models]
    fields = []
    for item in shown:
        prompts = boxes.per_image[item.image_id]
        image = dataset.read_image(item)
        largest = np.argsort(-np.prod(prompts.boxes[:, 2:] - prompts.boxes[:, :2], axis=1))[:8]
        rles = [dataset.ground_truth_rle(int(prompts.annotation_ids[i])) for i in largest]
        truth = decode(rles, (item.height, item.width))
        prompted = Example(item.name, image, prompts.boxes[largest], truth, truth)
        row = [place(draw_prompts(prompted)), place(draw_masks(image, truth))]
        for predictor in predictors:
            predictor.set_image(image)
            masks = predict_image(predictor, item, prompts).masks(largest.tolist())
            row.append(place(draw_masks(image, masks)))
        fields.append(np.concatenate(row, axis=1))
    fields += [np.full_like(fields[0], 255)] * (-len(fields) % across)
    rows = [np.concatenate(fields[i : i + across], axis=1) for i in range(0, len(fields), across)]
    return Image.fromarray(np.concatenate(rows))


FLAGS = flags.FLAGS


def work() -> int:
    """Writes the sheet."""
    models = [load_model(FLAGS.checkpoint, "")]
    if FLAGS.artefact:
        models.append(load_model(FLAGS.checkpoint, FLAGS.artefact))
    options = Options(images=FLAGS.images, annotations=FLAGS.annotations, num_scenes=FLAGS.count)
    make_sheet(evaluation_set(options, models[0].config), models, FLAGS.count, FLAGS.across).save(Path(FLAGS.out))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("images", "", "Folder of images; default: generated scenes.")
    flags.DEFINE_string("annotations", "", "Its COCO instances file.")
    flags.DEFINE_string("checkpoint", "mini", "SAM weights.")
    flags.DEFINE_string("artefact", "", "The same, quantized.")
    flags.DEFINE_integer("count", 24, "Pictures.", lower_bound=1)
    flags.DEFINE_integer("across", 3, "Pictures in a row.", lower_bound=1)
    flags.DEFINE_string("out", None, "The picture to write.", required=True)
    app.run(lambda argv: finish(argv, work))
