"""Serves a page to try a quantized SAM beside the floating-point one: click, drag a box, or segment everything.

    pip install -e '.[demo]'
    python -m experiments.demo
    python -m experiments.demo --checkpoint=sam_vit_b_01ec64.pth --artefact=sam_w4a4.safetensors

Without --artefact the model is quantized to W4A4 by statistics of a few generated scenes first. The page is at
http://127.0.0.1:7860 and only for this machine, unless --host says otherwise. It reads what a visitor uploads and
serves no file of this machine.
"""

import importlib.util
import os
import sys
from pathlib import Path

from absl import flags

import ahcptq_jax
from ahcptq_jax.command import finish, launch, use_compilation_cache
from experiments.demo_page import session
from experiments.scenes.scenes import EVAL_SEED, make_scene
from sam_flax import load_sam
from sam_flax.errors import InputError
from sam_flax.files.images import read_image

# Before gradio is imported, which reads it then.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    from experiments.demo_page import page
except ImportError:  # an extra
    page = None  # type: ignore[assignment]

MOST_MB = 1000


def main(argv: list[str]) -> int:
    """The command."""
    return finish(argv, _command, lambda: "the page is closed.")


def _command() -> int:
    values = flags.FLAGS
    if page is None:
        if importlib.util.find_spec("gradio") is not None:
            raise InputError("gradio is installed but cannot be imported; install it anew: pip install -e '.[demo]'.")
        raise InputError("The page needs gradio; install it with pip install -e '.[demo]'.")
    if not 1 <= values.max_mb <= MOST_MB:
        raise InputError(f"--max_mb={values.max_mb} must lie between 1 and {MOST_MB}.")
    if not 0 <= values.port <= 65535:
        raise InputError(f"--port={values.port} must lie between 0 and 65535.")
    sam, params = load_sam(values.checkpoint)
    if values.image:
        image = read_image(values.image)
    else:
        image = make_scene(EVAL_SEED, 0, max(64, min(512, sam.config.img_size))).image
    files = {Path(path).name: ahcptq_jax.load(path, sam.config) for path in values.artefact}
    if not files:
        print("Quantizing to W4A4 by statistics; give a better one with --artefact.", file=sys.stderr, flush=True)
        files = {"w4a4, made at the start": session.quantize_now(sam, params, "ahcptq", "w4a4")}
    try:
        page.build(page.Models(sam, params, files, image)).queue().launch(
            server_name=values.host,
            server_port=values.port or None,
            max_file_size=f"{values.max_mb}mb",
            allowed_paths=[],
            share=False,
            enable_monitoring=False,
            footer_links=[],
            theme=page.THEME,
            css=page.CSS,
            js=page.SCRIPT,
        )
    except OSError as error:
        raise InputError(
            f"The page cannot be served on {values.host}:{values.port} ({error}); choose another --port."
        ) from error
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "mini", "SAM weights, as experiments.main takes them.")
    flags.DEFINE_multi_string("artefact", [], "A quantized model of these weights; may be given several times.")
    flags.DEFINE_string("image", "", "Image to begin with; default: a generated scene.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; 0.0.0.0 lets other machines in.")
    flags.DEFINE_integer("port", 7860, "Port; 0 takes the first free one from 7860 on.")
    flags.DEFINE_integer("max_mb", 20, "Largest file that may be uploaded, MB.")
    use_compilation_cache()
    launch(main)
