"""Which images the report shows."""

import numpy as np

from experiments.coco import CocoDataset, annotated_boxes
from experiments.evaluate import ShapePredictor, evaluate, filled_box, inscribed_ellipse
from experiments.report import make_examples
from experiments.scenes.scenes import scene_dataset, to_coco


def test_examples_span_the_agreement():
    dataset = CocoDataset.from_memory(*to_coco(scene_dataset(seed=0, count=5, size=128)))
    boxes = annotated_boxes(dataset)
    fp = evaluate(ShapePredictor(inscribed_ellipse), dataset, boxes, progress=None)
    quantized = evaluate(ShapePredictor(filled_box), dataset, boxes, progress=None)
    examples = make_examples(dataset, boxes, fp, quantized, count=3, max_boxes=2)
    assert len({example.title for example in examples}) == 3
    for example in examples:
        assert example.gt_masks.shape == (2, 128, 128)
        np.testing.assert_array_equal(example.fp_masks, inscribed_ellipse(example.boxes, 128, 128))
        np.testing.assert_array_equal(example.quantized_masks, filled_box(example.boxes, 128, 128))
        # The truth belongs to the drawn boxes: it fills them up to their sides.
        assert (example.gt_masks & ~example.quantized_masks).sum() == 0
        assert example.gt_masks.any()
    assert len(make_examples(dataset, boxes, fp, quantized, count=50)) == 5
