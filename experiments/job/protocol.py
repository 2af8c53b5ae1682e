"""The protocol of an evaluation: how a model is prompted, which of its masks counts, and how masks are ranked.

Papers differ in all three and rarely say so; one mask or the best of three alone moves SAM-B's AP by 2.4. So each is a
choice, written into `results.json` and above every table.
"""

import dataclasses

from ahcptq_jax.settings import check_settings, setting, settings_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How masks are asked for and ranked; the defaults are AHCPTQ's.

    Raises:
        InputError: if a choice is unknown.
    """

    multimask: str = setting(
        "single",
        "Masks for each prompt: 'single' takes the one that SAM makes for a clear prompt; 'best' makes three and takes "
        "the one whose predicted IoU is the greatest.",
        choices=("single", "best"),
        sweep=False,
    )
    score: str = setting(
        "product",
        "What ranks masks for AP: the score of the 'detector' (1 for annotated boxes), the 'iou' that the model "
        "predicts, or their 'product'.",
        choices=("product", "detector", "iou"),
        sweep=False,
    )
    prompt: str = setting(
        "box",
        "What the model is given of each box: the 'box', or a 'point', its centre.",
        choices=("box", "point"),
        sweep=False,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def as_dict(self) -> dict[str, str]:
        """The three choices by name."""
        return {name: getattr(self, name) for name in settings_of(EvaluationProtocol)}

    def describe(self) -> str:
        """The protocol in one line, with the flags that make it."""
        masks = {"single": "one mask a prompt", "best": "the best of three masks by predicted IoU"}[self.multimask]
        ranks = {
            "product": "ranked by box score times predicted IoU",
            "detector": "ranked by box score",
            "iou": "ranked by predicted IoU",
        }[self.score]
        prompts = {"box": "box prompts", "point": "points at the centres of boxes as prompts"}[self.prompt]
        flags = " ".join(f"--{name}={value}" for name, value in self.as_dict().items())
        return f"protocol: {prompts}, {masks}, {ranks} ({flags})."


AHCPTQ_PROTOCOL = EvaluationProtocol()
