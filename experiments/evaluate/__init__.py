"""Mask AP of a promptable model on a COCO dataset.

Images stream through the predictor once: one image embedding, all its box prompts in a few batches, masks kept as run
lengths at the original size, from which every score is computed (COCO segm AP by pycocotools, mIoU, agreement of two
models). How the model is prompted, which mask counts and what ranks masks is the protocol (`experiments.job.protocol`).
"""

from experiments.evaluate.baselines import ShapePredictor as ShapePredictor
from experiments.evaluate.baselines import evaluate_baselines as evaluate_baselines
from experiments.evaluate.baselines import filled_box as filled_box
from experiments.evaluate.baselines import inscribed_ellipse as inscribed_ellipse
from experiments.evaluate.metrics import METRICS as METRICS
from experiments.evaluate.metrics import agreement_miou as agreement_miou
from experiments.evaluate.metrics import average_precision as average_precision
from experiments.evaluate.metrics import coco_results as coco_results
from experiments.evaluate.metrics import mean_iou as mean_iou
from experiments.evaluate.predictions import ImageResult as ImageResult
from experiments.evaluate.predictions import Predictor as Predictor
from experiments.evaluate.predictions import predict_image as predict_image
from experiments.evaluate.run import EvaluationResult as EvaluationResult
from experiments.evaluate.run import evaluate as evaluate
