"""MobileSAM: SAM's heads behind TinyViT (ChaoningZhang/MobileSAM)."""

import flax.linen as nn

from sam_flax.encoders.tiny_vit import MobileSamConfig, TinyVit, stage_graph
from sam_flax.segmenter import Segmenter
from sam_flax.stages import StageGraph


class MobileSam(Segmenter):
    """Segment Anything with a TinyViT."""

    config: MobileSamConfig

    @nn.nowrap
    def make_encoder(self) -> TinyVit:
        return TinyVit(self.config)

    @nn.nowrap
    def stages(self) -> StageGraph:
        return stage_graph(self.config)
