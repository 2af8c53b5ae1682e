"""Charts as SVG text: a frame with axes, and what is drawn into it."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

INK, MUTED, RULE = "#1d2733", "#5b6773", "#e3e7ec"
PALETTE = ("#2f6fb2", "#d9822b", "#3a9a6a", "#8a5fb0", "#b5473f", "#6b7885")
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 64, 16, 14, 44


def short(value: float) -> str:
    """A tick's label."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{prefix}"
    return f"{value:g}"


def linear_ticks(high: float) -> list[float]:
    """About five round steps from 0 to `high`."""
    step = 10 ** math.floor(math.log10(high / 5)) if high > 0 else 1.0
    step *= next(m for m in (1, 2, 5, 10) if high / (step * m) <= 6)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between."""
    return [10.0**e for e in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


@dataclasses.dataclass
class Frame:
    """A plot area with its axes; positions are in data units."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    left: int = MARGIN_LEFT

    def __post_init__(self) -> None:
        self.parts: list[str] = []

    def px(self, value: float) -> float:
        low, high = self.x
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return self.left + share * (self.width - self.left - MARGIN_RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return self.height - MARGIN_BOTTOM - share * (self.height - MARGIN_TOP - MARGIN_BOTTOM)

    def axes(self, x_label: str, y_label: str, *, x_ticks: Sequence[float] = (), y_ticks: Sequence[float] = ()) -> None:
        """Grid lines, tick labels and titles."""
        bottom, right = self.height - MARGIN_BOTTOM, self.width - MARGIN_RIGHT
        for value in y_ticks:
            y = self.py(value)
            self.parts.append(f'<line x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{RULE}"/>')
            self.text(self.left - 6, y + 4, short(value), anchor="end")
        for value in x_ticks:
            x = self.px(value)
            self.parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{MARGIN_TOP}" y2="{bottom}" stroke="{RULE}"/>')
            self.text(x, bottom + 16, short(value), anchor="middle")
        self.text((self.left + right) / 2, self.height - 8, x_label, anchor="middle")
        if y_label:
            y = (MARGIN_TOP + bottom) / 2
            self.parts.append(
                f'<text x="14" y="{y}" transform="rotate(-90 14 {y})" text-anchor="middle" fill="{MUTED}">'
                f"{escape(y_label)}</text>"
            )

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", fill: str = MUTED) -> None:
        """Text at pixels."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>')

    def bar(self, x: float, y: float, width: float, height: float, fill: str, tip: str) -> None:
        """A rectangle at pixels."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{max(height, 0.5):.1f}" '
            f'fill="{fill}"><title>{escape(tip)}</title></rect>'
        )

    def dot(self, x: float, y: float, fill: str, tip: str, *, radius: float = 4, hollow: bool = False) -> None:
        """A circle at data units."""
        paint = f'fill="none" stroke="{fill}" stroke-width="1.3"' if hollow else f'fill="{fill}" fill-opacity=".7"'
        self.parts.append(
            f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius}" {paint}>'
            f"<title>{escape(tip)}</title></circle>"
        )

    def line(
        self, points: Sequence[tuple[float, float]], stroke: str, *, dashed: bool = False, width: float = 1.6
    ) -> None:
        """A polyline at data units."""
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{dash}/>')

    def svg(self, title: str) -> str:
        """The finished chart."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}" '
            f'font-size="12">{"".join(self.parts)}</svg>'
        )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """HTML of coloured labels: (label, colour)."""
    items = "".join(f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in entries)
    return f'<p class="legend">{items}</p>'
