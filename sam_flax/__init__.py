"""Segment Anything in Flax: a pure function of a parameter pytree."""

from sam_flax.automatic_masks import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
from sam_flax.config import CONFIGS as CONFIGS
from sam_flax.config import MINI as MINI
from sam_flax.config import MINI_SCENES as MINI_SCENES
from sam_flax.config import VIT_B as VIT_B
from sam_flax.config import VIT_H as VIT_H
from sam_flax.config import VIT_L as VIT_L
from sam_flax.config import SamConfig as SamConfig
from sam_flax.files.checkpoint import load_params as load_params
from sam_flax.files.checkpoint import load_sam as load_sam
from sam_flax.files.checkpoint import save_params as save_params
from sam_flax.predictor import SamPredictor as SamPredictor
from sam_flax.sam import Sam as Sam
from sam_flax.sam import SamModel as SamModel
