"""Colours of masks, codes and groups, on light and on dark pages."""

# Okabe and Ito's colours, apart for colour-blind readers too; yellow is left out, it vanishes on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f5bd6", "#8c6d46")
INK_ON_LIGHT, INK_ON_DARK = "#1c2024", "#e6e8eb"


def palette(ink: str) -> list[str]:
    """The colours for a page of that ink; on a dark one they are lighter."""
    white = 0.3 if ink == INK_ON_DARK else 0.0
    mixed = ([round((1 - white) * part + white * 255) for part in rgb(colour)] for colour in PALETTE)
    return ["#{:02x}{:02x}{:02x}".format(*parts) for parts in mixed]


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of `#rrggbb`, 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
