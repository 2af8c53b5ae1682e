"""Quantized models behind the interfaces of segment_anything."""

import numpy as np

from sam_flax import SamAutomaticMaskGenerator, SamPredictor


def test_predictor_and_automatic_masks(tiny_quantized):
    image = np.random.default_rng(0).integers(0, 256, (60, 83, 3), dtype=np.uint8)
    predictor = SamPredictor(tiny_quantized)
    predictor.set_image(image)
    generator = SamAutomaticMaskGenerator(
        tiny_quantized, 2, pred_iou_thresh=-10.0, stability_score_thresh=0.0, box_nms_thresh=1.0
    )
    records = generator.generate(image)
    assert len(records) == 12
    for record in records:
        masks, iou, _ = predictor.predict(np.array(record["point_coords"]), np.array([1]))
        (match,) = [i for i in range(3) if abs(iou[i] - record["predicted_iou"]) < 1e-6]
        np.testing.assert_array_equal(record["segmentation"], masks[match])
