"""The package as a whole: what importing it needs."""

import subprocess
import sys
from importlib.resources import files


def test_import_needs_no_library_of_the_commands():
    """OpenCV, matplotlib, pycocotools and PyTorch are not imported, and need not be there."""
    code = (
        "import sys\n"
        "for name in ('cv2', 'matplotlib', 'pycocotools', 'torch', 'torchvision'): sys.modules[name] = None\n"
        "import sam_flax\n"
        "sam_flax.load_sam, sam_flax.SamPredictor, sam_flax.SamModel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_types_are_published():
    assert files("sam_flax").joinpath("py.typed").is_file()
