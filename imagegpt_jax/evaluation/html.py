"""A page about an evaluation, in one HTML file that needs nothing else: no script, no network, pictures inside.

Shapes: H W pixels.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imagegpt_jax.images import Tile

_SIDE = 160  # pixels that a picture is shown at, at most; smaller ones are enlarged by whole factors
_WHOLE = 1000  # the same of whole pictures, which are never made smaller
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 260, 64, 40  # of a chart
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #e5e7eb }
table { border-collapse: collapse }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #f3f4f6 }
th:first-child, th:last-child, td:first-child { text-align: left } td.words { text-align: left; word-break: break-all }
.warning { background: #fef3c7; border-left: 4px solid #d97706; padding: .4rem .8rem; margin: .4rem 0 }
.gallery { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0 }
figcaption { max-width: 340px }
figure img { image-rendering: pixelated; margin-right: 3px } figcaption { font-size: .8rem; color: #4b5563 }
.note { color: #6b7280 } svg text { font: 11px system-ui, sans-serif; fill: #4b5563 }
"""


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _image(picture: UInt8[np.ndarray, "H W 3"], whole: bool) -> str:
    image = Image.fromarray(picture)
    if max(image.size) > _SIDE and not whole:
        scale = _SIDE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    factor = max(1, (_WHOLE if whole else _SIDE) // max(image.size))
    data = io.BytesIO()
    image.save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{text}" width="{image.width * factor}" height="{image.height * factor}"'
        ' alt="">'
    )


# ------------------------------------------------------------------------------------------------------------- charts


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def _frame(low: tuple[float, float], high: tuple[float, float], x_name: str, y_name: str, marks: str) -> str:
    def x_at(x: float) -> float:
        return _LEFT + (x - low[0]) / (high[0] - low[0] or 1) * (_WIDTH - _LEFT - 12)

    def y_at(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low[1]) / (high[1] - low[1] or 1) * (_HEIGHT - _BOTTOM - 14)

    lines = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}" stroke="#e5e7eb"/>'
        f'<text x="{_LEFT - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">{y:.5g}</text>'
        for y in _ticks(low[1], high[1])
    ]
    lines += [
        f'<text x="{x_at(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:.5g}</text>'
        for x in _ticks(low[0], high[0])
    ]
    names = (
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{_escape(x_name)}</text>'
        f'<text x="12" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {_HEIGHT / 2})">'
        f"{_escape(y_name)}</text>"
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{"".join(lines)}{names}{marks}</svg>'


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_name: str, y_name: str) -> str:
    """A line chart as SVG of series, name -> (x values, y values), without what is not finite."""
    lines = {
        name: [(x, y) for x, y in zip(*pair, strict=True) if math.isfinite(x) and math.isfinite(y)]
        for name, pair in series.items()
    }
    every = [point for line in lines.values() for point in line]
    if not every:
        return '<p class="note">nothing to draw</p>'
    low, high = np.min(every, axis=0), np.max(every, axis=0)
    high = np.where(high > low, high, low + (np.abs(low) * 0.1 + 1e-9))
    scale = np.array([_WIDTH - _LEFT - 12, _HEIGHT - _BOTTOM - 14]) / (high - low)
    marks = []
    for i, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        places = [
            (f"{_LEFT + (x - low[0]) * scale[0]:.1f}", f"{_HEIGHT - _BOTTOM - (y - low[1]) * scale[1]:.1f}")
            for x, y in line
        ]
        points = " ".join(map(",".join, places))
        marks.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(line) <= 30:
            marks += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>' for x, y in places]
        label = (
            f'<text x="{_WIDTH - 18}" y="{22 + 14 * i}" text-anchor="end" style="fill:{colour}">{_escape(name)}</text>'
        )
        marks.append(label)
    return _frame((low[0], low[1]), (high[0], high[1]), x_name, y_name, "".join(marks))


def histogram(counts: Sequence[int] | np.ndarray, x_name: str, y_name: str) -> str:
    """A bar chart as SVG, of at most 320 bars: where there are more counts, each bar is the mean of several."""
    counts = np.asarray(counts, np.float64)
    bars = [float(part.mean()) for part in np.array_split(counts, min(len(counts), 320))]
    top = max([*bars, 1e-9])
    width, heights = (_WIDTH - _LEFT - 12) / len(bars), [h / top * (_HEIGHT - _BOTTOM - 14) for h in bars]
    marks = "".join(
        f'<rect x="{_LEFT + i * width:.2f}" width="{max(width - 0.3, 0.4):.2f}"'
        f' y="{_HEIGHT - _BOTTOM - h:.1f}" height="{h:.1f}" fill="{_COLOURS[0]}"/>'
        for i, h in enumerate(heights)
    )
    return _frame((0.0, 0.0), (float(len(counts)), top), x_name, y_name, marks)


# --------------------------------------------------------------------------------------------------------------- page


class Report:
    """A page that grows section by section."""

    def __init__(self, title: str):
        self._title, self._parts = title, [f"<h1>{_escape(title)}</h1>"]

    def section(self, title: str, body: str, note: str = "") -> None:
        """Adds HTML under a heading."""
        said = f'<p class="note">{_escape(note)}</p>' if note else ""
        self._parts.append(f"<section><h2>{_escape(title)}</h2>{said}{body}</section>")

    def table(self, title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Adds a table; its last column holds words."""
        head = "".join(f"<th>{_escape(name)}</th>" for name in names)
        lines = [
            "".join(f"<td{' class=words' if i == len(row) - 1 else ''}>{_escape(v)}</td>" for i, v in enumerate(row))
            for row in rows
        ]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        self.section(title, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def warnings(self, warnings: Sequence[Mapping[str, str]]) -> None:
        """Adds named warnings."""
        if warnings:
            lines = [f'<p class="warning"><b>{_escape(w["name"])}</b> {_escape(w["text"])}</p>' for w in warnings]
            self.section("Warnings", "".join(lines))

    def gallery(self, title: str, tiles: Sequence[Tile], note: str = "", *, whole: bool = False) -> None:
        """Adds pictures with captions; `whole` ones keep their size."""
        figures = []
        for tile in tiles:
            pictures = "".join(_image(picture, whole) for picture in tile.images)
            figures.append(f"<figure>{pictures}<figcaption>{_escape(tile.caption)}</figcaption></figure>")
        self.section(title, f'<div class="gallery">{"".join(figures)}</div>', note)

    def html(self) -> str:
        """The whole page."""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_escape(self._title)}</title>'
            f"<style>{_STYLE}</style></head><body>{''.join(self._parts)}</body></html>\n"
        )
