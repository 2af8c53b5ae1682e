"""COCO datasets and box prompts, checked when they are read.

A dataset is a list of images (files, or arrays in memory) and their annotations in COCO's instance format. A box set is
the list of prompts per image: the annotated boxes, or those of any detector in COCO's results format.

Every failure is one sentence that names the file and says what to do about it. What real data sets contain and is
harmless is repaired and counted instead: boxes that stick out of the image are clipped, boxes of zero width or height
are kept as ground truth but not used as prompts.
"""

from experiments.coco.dataset import Annotation as Annotation
from experiments.coco.dataset import CocoDataset as CocoDataset
from experiments.coco.dataset import ImageItem as ImageItem
from experiments.coco.dataset import load_coco as load_coco
from experiments.coco.dataset import stream_images as stream_images
from experiments.coco.prompts import BoxSet as BoxSet
from experiments.coco.prompts import ImageBoxes as ImageBoxes
from experiments.coco.prompts import annotated_boxes as annotated_boxes
from experiments.coco.prompts import load_boxes as load_boxes
from experiments.coco.prompts import load_detections as load_detections
from experiments.coco.prompts import prompted_images as prompted_images
