"""The page to try a model: its logic without a browser, and, by name, the page itself in a headless one."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.bench.made_up import random_quantized
from experiments.demo_page import session
from experiments.demo_page.session import Answer, Prompts
from sam_flax import Sam, SamModel
from sam_flax.errors import InputError

ROOT = Path(__file__).parents[2]
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def test_a_small_gesture_is_a_click_and_a_large_one_a_box():
    clicked = Prompts().after("0.5,0.5,0.505,0.5,1", 200, 100, label=1)
    assert clicked == Prompts(points=((101.0, 50.0, 1),))
    again = clicked.after("0.1,0.2,0.1,0.2,2", 200, 100, label=0)
    assert [point[2] for point in again.points] == [1, 0]
    # From any corner, cut at the border.
    dragged = again.after("0.75,1.5,0.25,0.5,3", 200, 100, label=1)
    assert dragged == Prompts(box=(50.0, 50.0, 150.0, 100.0))
    with_point = dragged.after("0.4,0.6,0.4,0.6,4", 200, 100, label=1)
    assert with_point.box == dragged.box and len(with_point.points) == 1
    assert Prompts().empty and not with_point.empty and not Prompts(everything=True).empty


@pytest.mark.parametrize(("gesture", "part"), [("", "not four numbers"), ("a,b,c,d", "four"), ("0,0,0.5,0", "no area")])
def test_other_gestures_are_refused(gesture, part):
    with pytest.raises(InputError, match=part):
        Prompts().after(gesture, 200, 100, label=1)


def test_both_models_answer_the_same_prompts(sam_tiny):
    config, params = sam_tiny
    quantized = random_quantized(config, params)
    first = session.look("float", SamModel(Sam(config), params), IMAGE)
    second = session.look("quantized", quantized, IMAGE)
    assert second.nbytes == quantized.summary().nbytes < first.nbytes
    prompts = Prompts(box=(10, 10, 60, 50))
    answers = tuple(session.answer(side, IMAGE, prompts) for side in (first, second))
    direct, *_ = first.predictor.predict(box=np.array(prompts.box), multimask_output=False)
    np.testing.assert_array_equal(answers[0].masks[0], direct[0])
    text = session.figures(first, second, answers)
    assert f"{session.agreement(*answers):.3f}" in text and f"{first.nbytes / 1e6:.2f}" in text
    one = session.answer(first, IMAGE, Prompts(points=((30, 30, 1),)))
    masks, quality, _ = first.predictor.predict(np.array([[30, 30]]), np.array([1]))
    np.testing.assert_array_equal(one.masks[0], masks[quality.argmax()])


def test_agreement_and_pictures_of_masks():
    mask, none = np.zeros((60, 90), bool), np.zeros((60, 90), bool)
    mask[:20], none[:10] = True, True
    one, half, empty = (Answer(masks, 0.9, 1.0) for masks in ((mask,), (none,), ()))
    assert session.agreement(one, one) == 1 and session.agreement(one, half) == 0.5
    assert session.agreement(one, empty) == 0 and session.agreement(empty, empty) == 1
    drawn = session.picture(IMAGE, Prompts(points=((45, 50, 1),), box=(5, 30, 20, 40)), one)
    assert (drawn[5:15] != IMAGE[5:15]).any(-1).all() and (drawn[25:28] == IMAGE[25:28]).all()
    assert (drawn[30, 6:19] == 255).all() and (drawn[50, 45] == [0, 160, 0]).all()
    assert drawn.shape == IMAGE.shape and (session.picture(IMAGE, Prompts(), None) == IMAGE).all()


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a page with mini-scenes runs, on a machine that has gradio."""
    pytest.importorskip("gradio", reason="The page needs the extra demo.")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "experiments.demo", "--checkpoint=mini-scenes", f"--port={port}", "--max_mb=1"]
    log = tmp_path_factory.mktemp("demo") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).read()
            break
        time.sleep(1)
    yield url
    process.kill()
    process.wait()


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, Debian's."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="The browser is driven by selenium.")
    if not Path("/usr/bin/chromium").exists() or not Path("/usr/bin/chromedriver").exists():
        pytest.skip("There is no /usr/bin/chromium with /usr/bin/chromedriver.")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"):
        options.add_argument(f"--{word}")
    for word in ("disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1200,1000")
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    # A person may want to look at what was there last.
    if folder := os.environ.get("DEMO_SCREENSHOTS"):
        driver.save_screenshot(str(Path(folder) / "last.png"))
    driver.quit()


def wait(condition, seconds=180.0):
    """The first true answer of a function that may fail while a page is built."""
    end, fault = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except Exception as error:  # noqa: BLE001
            fault = error
        time.sleep(0.3)
    raise AssertionError(f"{condition} stayed false; {fault}")


class Page:
    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        wait(lambda: self.image("first").size["width"] > 50 and "encoder" in self.text("table"))

    def image(self, name):
        return self.driver.find_element("css selector", f"#{name} img")

    def text(self, name):
        return self.driver.find_element("css selector", f"#{name}").text

    def shot(self, name):
        if folder := os.environ.get("DEMO_SCREENSHOTS"):
            time.sleep(1)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def agreement(self):
        found = re.search(r"Agreement.*: ([\d.]+)", self.text("table"))
        return float(found[1]) if found else None

    def drag(self, name, start, end):
        from selenium.webdriver.common.action_chains import ActionChains

        image = self.image(name)
        width, height = image.size["width"], image.size["height"]
        at = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in (start, end)]
        chain = ActionChains(self.driver).move_to_element_with_offset(image, *at[0]).click_and_hold()
        chain.move_by_offset(at[1][0] - at[0][0], at[1][1] - at[0][1]).release().perform()

    def upload(self, name, path):
        self.driver.find_element("css selector", f"#{name} input[type=file]").send_keys(str(path))


@pytest.mark.slow
def test_click_drag_everything_switch_and_bad_files(address, browser, tmp_path):
    page = Page(browser, address)
    page.shot("start")
    page.drag("first", (0.5, 0.5), (0.5, 0.5))
    assert 0 <= wait(page.agreement) <= 1
    assert len(page.text("table").splitlines()) >= 3
    page.shot("click")
    browser.find_element("css selector", "#clear").click()
    wait(lambda: page.agreement() is None)
    page.drag("second", (0.2, 0.2), (0.7, 0.8))
    wait(page.agreement)
    page.shot("box")
    browser.find_element("css selector", "#everything").click()
    wait(lambda: re.search(r"\d+ and \d+ masks", page.text("table")))
    page.shot("everything")
    browser.find_element("css selector", "#clear").click()
    wait(lambda: page.agreement() is None)

    (tmp_path / "bad.png").write_bytes(b"no image at all")
    page.upload("photo", tmp_path / "bad.png")
    wait(lambda: "bad.png is not an image" in page.text("note"))
    page.shot("bad")
    (tmp_path / "bad.safetensors").write_bytes(b"no model")
    page.upload("artefact", tmp_path / "bad.safetensors")
    wait(lambda: "bad.safetensors" in page.text("note"))

    before = page.image("first").get_attribute("src")
    Image.fromarray(IMAGE).resize((300, 200)).save(tmp_path / "good.png")
    browser.find_element("css selector", "#photo button").click()
    page.upload("photo", tmp_path / "good.png")
    wait(lambda: page.image("first").get_attribute("src") != before)
    page.drag("first", (0.1, 0.1), (0.9, 0.9))
    wait(page.agreement)

    browser.find_element("css selector", "#now").click()
    wait(lambda: "ahcptq w4a4, statistics alone" in page.text("table"))
    page.shot("now")


@pytest.mark.slow
def test_no_file_of_the_machine_is_served(address):
    for path in ("/etc/passwd", str(ROOT / "README.md"), "README.md", "../README.md"):
        for route in ("file=", "gradio_api/file="):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{address}/{route}{path}", timeout=10)
            assert caught.value.code in (401, 403, 404)
