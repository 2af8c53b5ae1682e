"""The report of a run: one HTML file that needs nothing else, to be read by people.

It shows the scores of the floating-point and the quantized model, masks of both side by side, and what the activations
of a few layers look like beside the codes that they are rounded to.
"""

from experiments.report.examples import Example as Example
from experiments.report.examples import make_examples as make_examples
from experiments.report.page import write_report as write_report
from experiments.report.panels import GroupPanel as GroupPanel
from experiments.report.panels import HybridPanel as HybridPanel
from experiments.report.panels import layer_panels as layer_panels
