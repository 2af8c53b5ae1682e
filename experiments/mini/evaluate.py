"""How well a SAM segments what one point on an object asks for, and what is left of it on blank images.

    python -m experiments.mini.evaluate --images=coco/val2017 --annotations=coco/annotations/instances_val2017.json

The point is the innermost pixel of the object's mask. Printed are the mean IoU of the best of the three masks, as SAM's
authors report it, and of the mask that the model itself thinks best. Boxes are `experiments.main`'s business.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from absl import app, flags
from tqdm import tqdm

import ahcptq_jax
from ahcptq_jax.command import finish
from experiments.coco import CocoDataset, ImageItem, load_coco
from experiments.coco.masks import decode
from sam_flax import SamModel, SamPredictor, load_sam
from sam_flax.predictor import MaskModel

CHUNK = 16  # prompts decoded together, so that a decoder compiles once
BLANK = 128  # the gray of `experiments.main`'s blank images


def innermost_point(mask: np.ndarray) -> tuple[int, int]:
    """x, y of the pixel of a mask (H, W) that is farthest from what is not the mask, the frame included."""
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y)


def objects_of(dataset: CocoDataset, item: ImageItem) -> np.ndarray:
    """Masks (N, H, W) of the image's objects, crowds and empty ones left out."""
    rles = [dataset.ground_truth_rle(a.annotation_id) for a in item.annotations if not a.iscrowd]
    masks = decode(rles, (item.height, item.width))
    return masks[masks.any(axis=(1, 2))]


def point_ious(predictor: SamPredictor, image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """IoU (N, 2) of the best mask, and of the one predicted to be best, for a point on each object."""
    predictor.set_image(image)
    points = np.array([innermost_point(mask) for mask in masks], np.float32)
    found = []
    for start in range(0, len(masks), CHUNK):
        chunk = points[start : start + CHUNK]
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], CHUNK - len(chunk), axis=0)])
        predicted, scores, _ = predictor.predict_batch(
            point_coords=filled[:, None], point_labels=np.ones((CHUNK, 1)), multimask_output=True
        )
        for truth, three, score in zip(masks[start : start + CHUNK], predicted, scores, strict=False):
            iou = (three & truth).sum((1, 2)) / (three | truth).sum((1, 2))
            found.append((iou.max(), iou[score.argmax()]))
    return np.array(found)


def evaluate_points(model: MaskModel, dataset: CocoDataset, blank: bool) -> np.ndarray:
    """`point_ious` of all objects of a dataset, (N, 2)."""
    predictor = SamPredictor(model)
    found = [np.zeros((0, 2))]
    for item in tqdm(dataset.items, desc="points (blank images)" if blank else "points", mininterval=5):
        masks = objects_of(dataset, item)
        if len(masks):
            image = dataset.read_image(item)
            found.append(point_ious(predictor, np.full_like(image, BLANK) if blank else image, masks))
    return np.concatenate(found)


def load_model(checkpoint: str, artefact: str) -> MaskModel:
    """A SAM in floating point, or quantized from `artefact`."""
    sam, params = load_sam(checkpoint)
    return ahcptq_jax.load(artefact, sam.config) if artefact else SamModel(sam, params)


FLAGS = flags.FLAGS


def run(images: str, annotations: str, checkpoint: str, artefact: str, limit: int | None) -> dict[str, float]:
    """The scores by name."""
    dataset = load_coco(images, annotations, limit)
    model = load_model(checkpoint, artefact)
    scores: dict[str, float] = {}
    for name, blank in (("", False), ("blank_", True)):
        best, own = evaluate_points(model, dataset, blank).mean(axis=0)
        scores |= {f"{name}best_of_three": round(float(best), 4), f"{name}by_predicted_iou": round(float(own), 4)}
    return scores


def work() -> int:
    """Prints the scores, and writes them where the flags say."""
    scores = run(FLAGS.images, FLAGS.annotations, FLAGS.checkpoint, FLAGS.artefact, FLAGS.limit or None)
    print(json.dumps(scores))
    if FLAGS.out:
        Path(FLAGS.out).write_text(json.dumps(scores) + "\n")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "Folder of images.", required=True)
    flags.DEFINE_string("annotations", None, "COCO instances file.", required=True)
    flags.DEFINE_string("checkpoint", "mini", "SAM weights.")
    flags.DEFINE_string("artefact", "", "A quantized model of these weights, to be judged instead.")
    flags.DEFINE_integer("limit", 0, "Images, from the start; 0: all.")
    flags.DEFINE_string("out", "", "File for the scores, JSON.")
    app.run(lambda argv: finish(argv, work))
