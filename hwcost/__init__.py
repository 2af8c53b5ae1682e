"""What a quantized SAM would cost on an FPGA: exact counts, sourced constants, estimates with intervals."""

from hwcost.board.accelerator import PRESETS as PRESETS
from hwcost.board.accelerator import Accelerator as Accelerator
from hwcost.board.accelerator import Design as Design
from hwcost.board.estimate import Estimate as Estimate
from hwcost.board.estimate import estimate as estimate
from hwcost.counts.codes import AssumedCodes as AssumedCodes
from hwcost.counts.codes import Histogram as Histogram
from hwcost.counts.codes import load_histograms as load_histograms
from hwcost.counts.counts import Counts as Counts
from hwcost.counts.counts import count as count
from hwcost.counts.measure import measure_histograms as measure_histograms
