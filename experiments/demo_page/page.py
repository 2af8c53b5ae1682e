"""The page itself, made with gradio (extra `demo`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

import ahcptq_jax
from ahcptq_jax import METHODS, Quantized
from experiments.demo_page import session
from experiments.demo_page.session import Prompts, Side
from sam_flax import SamModel
from sam_flax.errors import InputError
from sam_flax.files.images import read_image
from sam_flax.sam import Params, Sam

BITS = ("w2a4", "w3a3", "w4a4", "w5a5", "w6a6", "w8a8")
FLOAT = "floating point"
PROGRESS = gr.Progress()  # as the default of an argument it makes gradio show a bar
HEIGHT = 420  # of a picture, pixels
HELP = "Click on an object, or drag a box around it, on either picture."
# No address outside this machine is asked for: gradio's default theme loads its fonts from one.
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.view img {width: 100%; height: 100%; object-fit: contain; cursor: crosshair; touch-action: none; user-select: none}
.view img {-webkit-user-drag: none}
#table th, #table td {padding: 4px 8px}
"""
# A press and a release on a picture become "x0,y0,x1,y1", shares of the picture's sides, and then a click on a button
# out of sight, which hands them on. Pictures are shown whole inside their element, with bands beside them.
SCRIPT = """
() => {
  let start = null;
  const place = (event, image) => {
    const frame = image.getBoundingClientRect();
    const scale = Math.min(frame.width / image.naturalWidth, frame.height / image.naturalHeight);
    const left = frame.left + (frame.width - scale * image.naturalWidth) / 2;
    const top = frame.top + (frame.height - scale * image.naturalHeight) / 2;
    const [width, height] = [scale * image.naturalWidth, scale * image.naturalHeight];
    return [(event.clientX - left) / width, (event.clientY - top) / height];
  };
  const target = (event) => event.target.tagName === "IMG" && event.target.closest(".view") ? event.target : null;
  document.addEventListener("dragstart", (event) => { if (target(event)) event.preventDefault(); });
  document.addEventListener("pointerdown", (event) => {
    const image = target(event);
    start = image ? {image, at: place(event, image)} : null;
  });
  document.addEventListener("pointerup", (event) => {
    if (!start) return;
    window.gesture = [...start.at, ...place(event, start.image)].join(",");
    start = null;
    document.querySelector("#hand").click();
  });
}
"""
HAND_ON = "(gesture, label, state) => [window.gesture, label, state]"


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """What one visitor sees: an image, what is asked for, and both models on it."""

    image: np.ndarray
    prompts: Prompts
    first: Side
    second: Side


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """What the page is about.

    Attributes:
        sam, params: the floating-point model.
        files: names and quantized models that the command was given or has made.
        image: shown first.
    """

    sam: Sam
    params: Params
    files: dict[str, Quantized]
    image: np.ndarray

    @property
    def float_model(self) -> SamModel:
        return SamModel(self.sam, self.params)


def build(models: Models) -> gr.Blocks:
    """The page; nothing is served yet."""
    names = list(models.files)

    def draw(shown: Shown, note: str = HELP) -> tuple[Any, ...]:
        """State, both pictures, the table, the note under it."""
        sides, prompts = (shown.first, shown.second), shown.prompts
        if prompts.empty:
            plain = session.picture(shown.image, prompts, None)
            return shown, plain, plain, session.figures(*sides, None), note
        answers = (
            session.answer(shown.first, shown.image, prompts),
            session.answer(shown.second, shown.image, prompts),
        )
        first, second = (session.picture(shown.image, prompts, one) for one in answers)
        return shown, first, second, session.figures(*sides, answers), note

    def refused(error: Exception, shown: Shown) -> tuple[Any, ...]:
        """The page as it was, with what is wrong."""
        return draw(shown, f"⚠️ {error}")

    def begin() -> tuple[Any, ...]:
        first = session.look(FLOAT, models.float_model, models.image)
        second = session.look(names[0], models.files[names[0]], models.image)
        return draw(Shown(models.image, Prompts(), first, second))

    def take_image(file: str | None, shown: Shown) -> tuple[Any, ...]:
        if file is None:
            return draw(shown)
        try:
            image = read_image(file)
        except (InputError, OSError) as error:
            return refused(InputError(str(error).replace(file, Path(file).name)), shown)
        sides = (session.look(side.name, side.predictor.model, image) for side in (shown.first, shown.second))
        return draw(Shown(image, Prompts(), *sides))

    def take_gesture(gesture: str, label: str, shown: Shown) -> tuple[Any, ...]:
        height, width = shown.image.shape[:2]
        try:
            prompts = shown.prompts.after(gesture, width, height, int(label == "object"))
        except InputError as error:
            return refused(error, shown)
        return draw(dataclasses.replace(shown, prompts=prompts))

    def ask_everything(shown: Shown) -> tuple[Any, ...]:
        return draw(dataclasses.replace(shown, prompts=Prompts(everything=True)))

    def clear(shown: Shown) -> tuple[Any, ...]:
        return draw(dataclasses.replace(shown, prompts=Prompts()))

    def with_second(shown: Shown, name: str, model: Quantized) -> tuple[Any, ...]:
        return draw(dataclasses.replace(shown, second=session.look(name, model, shown.image)))

    def choose(name: str, shown: Shown) -> tuple[Any, ...]:
        return with_second(shown, name, models.files[name])

    def take_artefact(file: str | None, shown: Shown) -> tuple[Any, ...]:
        if file is None:
            return draw(shown)
        name = Path(file).name
        try:
            model = ahcptq_jax.load(file, models.sam.config)
        except (InputError, ValueError, OSError) as error:
            return refused(InputError(str(error).replace(file, name)), shown)
        return with_second(shown, name, model)

    def quantize(method: str, bits: str, shown: Shown, progress: Any = PROGRESS) -> tuple[Any, ...]:
        progress(0.1, desc=f"{method} {bits}: statistics of {session.CALIBRATION_SCENES} scenes")
        try:
            model = session.quantize_now(models.sam, models.params, method, bits)
        except InputError as error:
            return refused(error, shown)
        return with_second(shown, f"{method} {bits}, statistics alone", model)

    with gr.Blocks(title="Quantized SAM beside floating point", analytics_enabled=False) as page:
        state = gr.State()
        gesture = gr.Textbox(visible=False)
        hand = gr.Button(elem_id="hand", visible="hidden")
        gr.Markdown("### Segment Anything, quantized, beside floating point")
        with gr.Row():
            first = gr.Image(
                label=FLOAT, interactive=False, elem_classes="view", elem_id="first", buttons=[], height=HEIGHT
            )
            second = gr.Image(
                label="quantized", interactive=False, elem_classes="view", elem_id="second", buttons=[], height=HEIGHT
            )
        note = gr.Markdown(HELP, elem_id="note")
        with gr.Row():
            with gr.Column():
                table = gr.Markdown(elem_id="table")
                label = gr.Radio(["object", "background"], value="object", label="a click means")
                with gr.Row():
                    everything = gr.Button("Everything", elem_id="everything")
                    clearing = gr.Button("Clear", elem_id="clear")
            with gr.Column():
                photo = gr.File(label="image: drop or choose a file", elem_id="photo", height=110)
                choice = gr.Dropdown(names, value=names[0], label="quantized model", elem_id="choice")
                artefact = gr.File(label="a quantized .safetensors: drop or choose", elem_id="artefact", height=110)
                with gr.Row():
                    method = gr.Dropdown(sorted(METHODS), value="ahcptq", label="method")
                    bits = gr.Dropdown(list(BITS), value="w4a4", label="bits")
                    now = gr.Button("Quantize now", elem_id="now")
        shown = [state, first, second, table, note]
        page.load(begin, None, shown)
        photo.change(take_image, [photo, state], shown)
        hand.click(take_gesture, [gesture, label, state], shown, js=HAND_ON, show_progress="hidden")
        everything.click(ask_everything, state, shown)
        clearing.click(clear, state, shown)
        choice.input(choose, [choice, state], shown)
        artefact.change(take_artefact, [artefact, state], shown)
        now.click(quantize, [method, bits, state], shown)
    return page
