"""A simulation's time line as a picture. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from ..svg import curve, document, frame, text
from .measure import Happening, Moment, Result
from .report import Simulated

_WIDTH = 960
_LEFT = 70
_RIGHT = 20
_HEIGHT = 110
"""Of one chart."""

_GAP = 46
_MARKED = ("failed", "restored", "placed", "requests_failed", "routers_added", "router_left", "autoscale")
_MARK_COLOUR = "#d62728"


@dataclass(frozen=True, slots=True)
class _Line:
    """One quantity over time."""

    name: str
    colour: str
    values: Sequence[float]


def draw(simulated: Simulated) -> str:
    """The picture as an SVG document: charts under each other over one time, with marks where something happened."""
    result = simulated.result
    moments = result.moments
    charts = _charts(moments) if moments else []
    elements = [text(20, 26, simulated.title, size=16, bold=True)]
    summary = (
        f"{result.output_rate:.0f} tokens/s, to the first token {1e3 * result.ttft.p50:.0f} ms "
        f"(p99 {1e3 * result.ttft.p99:.0f}), between tokens {1e3 * result.itl.p50:.1f} ms (p99 {1e3 * result.itl.p99:.1f})"
    )
    elements.append(text(20, 46, summary))
    top = 84
    for title, lines, most in charts:
        elements += _chart(title, lines, most, [moment.at for moment in moments], top)
        top += _HEIGHT + _GAP
    if moments:
        elements += _marks(result, moments[-1].at, 84, top - _GAP)
    return document(_WIDTH, top, simulated.title, elements)


def _charts(moments: Sequence[Moment]) -> list[tuple[str, list[_Line], float | None]]:
    """Title, lines and, where it is known, the largest value of each chart."""
    return [
        (
            "tokens/s",
            [
                _Line("generated", "#4269d0", [moment.output_rate for moment in moments]),
                _Line("prompts", "#97bbf5", [moment.prompt_rate for moment in moments]),
            ],
            None,
        ),
        (
            "requests",
            [
                _Line("running", "#3ca951", [float(moment.running) for moment in moments]),
                _Line("waiting", "#ff725c", [float(moment.waiting) for moment in moments]),
            ],
            None,
        ),
        (
            "shares",
            [
                _Line("hosts busy", "#4269d0", [moment.utilisation for moment in moments]),
                _Line("busiest host", "#a463f2", [moment.busiest for moment in moments]),
                _Line("KV pages in use", "#efb118", [moment.kv_use for moment in moments]),
                _Line("balance", "#6cc5b0", [moment.balance for moment in moments]),
            ],
            1.0,
        ),
        (
            "processes",
            [
                _Line("expert hosts", "#4269d0", [float(moment.hosts) for moment in moments]),
                _Line("routers", "#efb118", [float(moment.routers) for moment in moments]),
            ],
            None,
        ),
    ]


def _chart(title: str, lines: Sequence[_Line], most: float | None, times: Sequence[float], top: int) -> list[str]:
    bottom, last = top + _HEIGHT, times[-1]
    highest = max([most or 0.0, *(value for line in lines for value in line.values)]) or 1.0
    elements = [
        text(20, top - 10, title, bold=True),
        frame(_LEFT, top, _WIDTH - _LEFT - _RIGHT, _HEIGHT),
        text(_LEFT - 6, top + 10, f"{highest:.4g}", size=10, end=True),
        text(_LEFT - 6, bottom, "0", size=10, end=True),
        text(_LEFT, bottom + 13, "0 s", size=10),
        text(_WIDTH - _RIGHT, bottom + 13, f"{last:.4g} s", size=10, end=True),
    ]
    x = 110.0
    for line in lines:
        elements.append(f'<rect x="{x:.0f}" y="{top - 19}" width="12" height="10" fill="{line.colour}"/>')
        elements.append(text(x + 17, top - 10, line.name))
        x += 32 + 7.0 * len(line.name)
        points = zip(times, line.values, strict=True)
        drawn = ((_x(at, last), bottom - _HEIGHT * value / highest) for at, value in points)
        elements.append(curve(drawn, line.colour, line.name))
    return elements


def _marks(result: Result, last: float, top: int, bottom: int) -> list[str]:
    """A dashed line through all charts where something happened; what it was shows under the pointer."""
    shown: list[Happening] = [happening for happening in result.happenings if happening.what in _MARKED]
    return [
        f'<line x1="{_x(one.at, last):.1f}" x2="{_x(one.at, last):.1f}" y1="{top}" y2="{bottom}" stroke="{_MARK_COLOUR}" '
        f'stroke-dasharray="3,3"><title>{escape(f"{one.at:.1f} s: {one.what} {one.subject} {one.detail}")}</title></line>'
        for one in shown
    ]


def _x(at: float, last: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * at / last
