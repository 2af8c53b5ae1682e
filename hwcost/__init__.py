"""What a quantized SAM would cost on an FPGA: exact counts, sourced constants, estimates with intervals."""

from hwcost.accelerator import PRESETS as PRESETS
from hwcost.accelerator import Accelerator as Accelerator
from hwcost.accelerator import Design as Design
from hwcost.codes import AssumedCodes as AssumedCodes
from hwcost.codes import Histogram as Histogram
from hwcost.codes import load_histograms as load_histograms
from hwcost.counts import Counts as Counts
from hwcost.counts import count as count
from hwcost.estimate import Estimate as Estimate
from hwcost.estimate import estimate as estimate
from hwcost.measure import measure_histograms as measure_histograms
