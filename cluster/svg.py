"""The few elements that pictures are made of. SVG, written by hand; what an element stands for shows under the pointer."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

FRAME_COLOUR = "#ccc"


def text(x: float, y: float, words: str, *, size: int = 12, bold: bool = False, end: bool = False) -> str:
    """Words that begin at `x`, or end there, on the line at `y`."""
    weight = ' font-weight="bold"' if bold else ""
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{weight}{anchor}>{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, colour: str, title: str, *, opacity: float = 1.0) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(0.0, width):.2f}" height="{height:g}" fill="{colour}" '
        f'fill-opacity="{opacity}"><title>{escape(title)}</title></rect>'
    )


def frame(x: float, y: float, width: float, height: float, colour: str = FRAME_COLOUR) -> str:
    """The outline of a rectangle."""
    return f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:g}" fill="none" stroke="{colour}"/>'


def curve(points: Iterable[tuple[float, float]], colour: str, title: str, *, dashed: bool = False) -> str:
    """A line through the points."""
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5,3"' if dashed else ""
    return (
        f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}><title>{escape(title)}'
        "</title></polyline>"
    )


def document(width: float, height: float, title: str, elements: Iterable[str]) -> str:
    """The whole picture."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" role="img" aria-label={quoteattr(title)}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(elements) + "\n</svg>\n"
    )
