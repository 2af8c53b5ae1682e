"""The report's page: one file, complete, escaped, and without anything from outside."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from experiments.evaluate import METRICS, filled_box
from experiments.report import Example, GroupPanel, HybridPanel, write_report


def metrics(value=50.0):
    return dict.fromkeys(METRICS, value)


def example_results():
    return {
        "fp": metrics(),
        "quantized": metrics(40.0) | {"APl": None},
        "fp_blank": metrics(1.0),
        "quantized_blank": metrics(2.0),
        "baselines": {"filled_box": metrics(3.0)},
        "agreement_mIoU": 0.876,
        "seconds": {"calibrate": 12.34},
        "bytes": {"fp32": 8_000_000, "quantized": 1_000_000},
        "config": {"w_bits": 4, "a_bits": 4, "method": "<script>alert(1)</script>", "recon": {"iters": 3}},
    }


def hybrid_panel(name="mlp/lin2/input"):
    counts = np.array([900, 50, 20, 0, 1])
    return HybridPanel(name, counts, np.linspace(-0.2, 2, 6), np.array([-0.2, -0.1, 0.0, 0.4, 1.0, 1.9]), 0.4)


def group_panel(channels=12, groups=3):
    rng = np.random.default_rng(0)
    low, high = -rng.random(channels), rng.random(channels)
    return GroupPanel(
        "qkv/input",
        low,
        high,
        (high - low) / 15,
        np.round(rng.random(channels) * 15),
        np.arange(channels) % groups,
    )


def make_example(size=(30, 40), count=2):
    boxes = np.tile([2.0, 3.0, 20.0, 25.0], (count, 1))
    masks = filled_box(boxes, *size)
    return Example('<b>"title"</b>', np.zeros((*size, 3), np.uint8), boxes, masks, masks, masks)


class Collector(HTMLParser):
    """Checks that tags close in order, and keeps what is referred to."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.alts = [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.sources += [attributes[key] for key in ("src", "srcset", "href") if key in attributes]
        if tag == "img":
            self.alts.append(attributes.get("alt"))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(path):
    collector = Collector()
    collector.feed(path.read_text(encoding="utf-8"))
    assert collector.open == []
    return collector


def test_the_report_is_one_self_contained_file(tmp_path):
    path = write_report(
        tmp_path / "out", example_results(), [make_example()], [hybrid_panel(), group_panel()], title="A <b>"
    )
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]
    page = parse(path)
    text = path.read_text(encoding="utf-8")
    # Three pictures, and two charts in a light and a dark version.
    assert len(page.sources) == 7 and len(page.alts) == 5
    for source in page.sources:
        prefix = "data:image/png;base64,"
        assert source.startswith(prefix)
        Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :]))).verify()
    assert all(page.alts)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    assert "A &lt;b&gt;" in text and "&lt;script&gt;" in text and "&lt;b&gt;&quot;title" in text


def test_numbers_of_the_table(tmp_path):
    text = write_report(tmp_path, example_results(), [], []).read_text(encoding="utf-8")
    for expected in (
        ">50.0<",
        ">40.0<",
        ">0.88<",
        "80\u00a0%",
        "8.0×",
        "12.3 s",
        "recon.iters",
        "W4A4",
        ">–<",
    ):
        assert expected in text, expected
    assert "Filled box, no model" in text and "Quantized, blank image" in text


def test_notes_are_printed(tmp_path):
    text = write_report(tmp_path, example_results(), [], [], notes=["3 boxes < all"]).read_text(encoding="utf-8")
    assert "3 boxes &lt; all" in text


@pytest.mark.parametrize("results", [{}, {"fp": metrics()}, {"fp": metrics(0.0), "quantized": metrics(None)}])
def test_absent_parts_are_left_out(tmp_path, results):
    parse(write_report(tmp_path, results, [], []))


@pytest.mark.parametrize(
    "panel",
    [
        group_panel(),
        group_panel(channels=1, groups=1),
        group_panel(channels=1000, groups=1000),
        group_panel(channels=1280, groups=8),
        HybridPanel("empty", np.zeros(3), np.arange(4.0), np.arange(4.0), 1.0),
        HybridPanel("constant", np.ones(1), np.array([0.0, 1e-9]), np.zeros(4), 0.0),
        hybrid_panel("<x>"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_unusual_layers_are_drawn_without_warnings(tmp_path, panel):
    parse(write_report(tmp_path, {}, [], [panel]))


@pytest.mark.parametrize("size, count", [((1, 1), 1), ((3, 400), 0), ((500, 20), 9), ((900, 1300), 1)])
def test_unusual_images_are_drawn(tmp_path, size, count):
    assert len(parse(write_report(tmp_path, {}, [make_example(size, count)], [])).alts) == 3
