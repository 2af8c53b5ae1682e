"""The pages of docs/ build without a broken link, and their code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def order():
    """The pages in the order of the menu, which is that in which they are read."""
    return [DOCS / name for name in re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def test_every_page_is_in_the_menu():
    assert sorted(order()) == sorted(DOCS.glob("*.md"))


def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="The site needs the extra docs.")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text())
        assert not [address for address in loaded if "canonical" not in address], page
    text = (tmp_path / "api" / "index.html").read_text()
    assert "Quantizes a segmenter, calibrated on a few images" in text


def test_the_code_of_the_pages_runs():
    """In one namespace, as a reader would who goes from page to page; blocks marked `py` show other libraries."""
    names = {}
    for page in order():
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), names)  # noqa: S102
    assert names["quantized"].config == names["again"].config


def test_commands_of_the_pages_have_these_flags():
    found = [line for page in order() for block in blocks(page, "sh") for line in block.splitlines()]
    known = (ROOT / "ahcptq_jax/config.py").read_text() + (ROOT / "experiments/job/options.py").read_text()
    others = (
        "hwcost/study/options",
        "ahcptq_jax/reconstruction/config",
        "experiments/job/devices",
        "experiments/scaling",
    )
    known += "".join((ROOT / f"{name}.py").read_text() for name in others) + "flagfile"
    flags = [flag for line in found for flag in re.findall(r"--(\w+)", line)]
    assert flags and all(re.search(rf"\b{flag}\b", known) for flag in flags)
