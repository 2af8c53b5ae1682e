"""What boxes alone give: shapes drawn into them, by predictors that never look at the image."""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments.coco import BoxSet, CocoDataset
from experiments.evaluate.run import evaluate
from experiments.job.protocol import AHCPTQ_PROTOCOL, EvaluationProtocol


def evaluate_baselines(
    dataset: CocoDataset, boxes: BoxSet, protocol: EvaluationProtocol = AHCPTQ_PROTOCOL
) -> dict[str, dict[str, float | None]]:
    """Metrics of the filled box and of the inscribed ellipse, which need no model; of the protocol, they are ranked."""
    shown = dataclasses.replace(protocol, multimask="single", prompt="box")
    shapes = {"filled_box": filled_box, "inscribed_ellipse": inscribed_ellipse}
    # Images are not looked at, so blank ones spare the reading.
    return {
        name: dict(evaluate(ShapePredictor(shape), dataset, boxes, blank=True, progress=None, protocol=shown).metrics)
        for name, shape in shapes.items()
    }


class ShapePredictor:
    """A predictor that draws a shape into every box and never looks at the image; its predicted IoU is 1."""

    def __init__(self, shape: Callable[[np.ndarray, int, int], np.ndarray]):
        self._shape = shape
        self._size = (0, 0)

    def set_image(self, image: np.ndarray) -> None:
        """Remembers the image's size."""
        self._size = (image.shape[0], image.shape[1])

    def predict_batch(
        self,
        boxes: np.ndarray | None = None,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        *,
        multimask_output: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks (N, 1, H, W), IoU (N, 1), and no logits (N, 1, 0, 0)."""
        del point_coords, point_labels, multimask_output
        assert boxes is not None, "shapes are drawn into boxes"
        masks = self._shape(boxes, *self._size)[:, None]
        return masks, np.ones((len(boxes), 1)), np.zeros((len(boxes), 1, 0, 0))


def filled_box(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The baseline mask that fills its box: pixels whose centre is inside.

    Args:
      boxes: (N, 4), `(x0, y0, x1, y1)` in pixels.

    Returns:
      bool (N, height, width).
    """
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    across, down = (x >= x0) & (x < x1), (y >= y0) & (y < y1)  # (N, W), (N, H)
    return down[:, :, None] & across[:, None, :]


def inscribed_ellipse(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The baseline mask that fills the largest ellipse in its box; arguments and result as `filled_box`."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x0, y0, x1, y1 = (boxes[:, i, None].astype(np.float64) for i in range(4))
    radius_x, radius_y = np.maximum((x1 - x0) / 2, 1e-9), np.maximum((y1 - y0) / 2, 1e-9)
    across = ((x - (x0 + x1) / 2) / radius_x) ** 2  # (N, W)
    down = ((y - (y0 + y1) / 2) / radius_y) ** 2  # (N, H)
    return down[:, :, None] + across[:, None, :] <= 1
