"""A measurement as a picture: throughput at each load, and how latencies are distributed. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..svg import bar, curve, document, frame, text
from .figures import gaps_of
from .run import Part, Result

_WIDTH = 960
_LEFT, _RIGHT = 190, 90
_BAR, _ROW = 14, 20
_HEIGHT = 170
"""Of a chart of curves."""

_COLOURS = ("#4269d0", "#ff725c")
"""Of each server."""

_LEVEL_COLOURS = ("#4269d0", "#efb118", "#3ca951", "#a463f2", "#ff725c", "#6cc5b0", "#9c6b4e", "#97bbf5")
_SHORTEST = 1e-5
"""Seconds where the axis of times begins at the earliest."""

_POINTS = 200
"""Of a curve: a quantile each."""


def draw(result: Result) -> str:
    """The picture as an SVG document.

    Bars are throughput, the median of the rounds, with a line from the least to the most. Curves are the share of requests, or
    tokens, that took at most so long; solid for the first server, dashed for the second.
    """
    plan = result.plan
    title = " against ".join(f"{server.model} at {server.address}" for server in plan.servers)
    elements = [text(20, 26, title, size=16, bold=True), text(20, 46, _asked(result))]
    y = 76.0
    elements += _throughput(result, y)
    y += 30 + (len(plan.levels) * len(plan.servers)) * _ROW + 34
    for name, weighed in (("to the first token", _to_first), ("between tokens", _between)):
        drawn, y = _curves(result, name, weighed, y)
        elements += drawn
    return document(_WIDTH, y, title, elements)


Weighed = Callable[[Part], tuple[np.ndarray, np.ndarray]]
"""Times of a part, in seconds, and how often each counts."""


def _asked(result: Result) -> str:
    workload = result.plan.workload
    if workload.trace is not None:
        asked = f"{len(workload.trace)} exchanges of a trace"
    else:
        asked = f"prompts of {workload.prompt}, answers of {workload.output} tokens"
    prefix = f", behind {workload.shared_prefix} that all share" if workload.shared_prefix else ""
    return f"{asked}{prefix}; {result.plan.rounds} round{'' if result.plan.rounds == 1 else 's'}"


def _throughput(result: Result, top: float) -> list[str]:
    plan = result.plan
    elements = [text(20, top, "output tokens/s", bold=True)]
    if len(plan.servers) > 1:
        for index, server in enumerate(plan.servers):
            elements.append(bar(150 + 130 * index, top - 10, 12, 12, _COLOURS[index], server.name))
            elements.append(text(167 + 130 * index, top, server.name))
    rates = {
        (index, level): [found.output_per_s for found in result.figures_of(index, level)]
        for level in plan.levels
        for index in range(len(plan.servers))
    }
    scale = (_WIDTH - _LEFT - _RIGHT) / (max(max(values) for values in rates.values()) or 1.0)
    y = top + 14
    for (index, level), values in rates.items():
        middle, least, most = float(np.median(values)), min(values), max(values)
        told = f"{plan.servers[index].name}, {level}: {middle:.1f} tokens/s ({least:.1f} to {most:.1f})"
        if index == 0:
            elements.append(text(20, y + 12, str(level), size=11))
        elements.append(bar(_LEFT, y, middle * scale, _BAR, _COLOURS[index], told))
        if most > least:
            across = [(_LEFT + least * scale, y + _BAR / 2), (_LEFT + most * scale, y + _BAR / 2)]
            elements.append(curve(across, "#333", told))
        elements.append(text(_WIDTH - 8, y + 12, f"{middle:.1f}", size=11, end=True))
        y += _ROW
    return elements


def _to_first(part: Part) -> tuple[np.ndarray, np.ndarray]:
    times = np.asarray([answer.times[0] - answer.sent for answer in part.measured.answers if answer.ok])
    return times, np.ones(len(times))


def _between(part: Part) -> tuple[np.ndarray, np.ndarray]:
    gaps, counts = gaps_of([answer for answer in part.measured.answers if answer.ok])
    return gaps / counts, counts


def _curves(result: Result, name: str, weighed: Weighed, top: float) -> tuple[list[str], float]:
    """For every level and server, the share that took at most so long, over times on a logarithmic axis; and where it ends."""
    plan = result.plan
    lines = []
    for number, level in enumerate(plan.levels):
        for index, server in enumerate(plan.servers):
            parts = [weighed(part) for part in result.parts if (part.server, part.level) == (index, level)]
            times, weights = (np.concatenate(of_rounds) for of_rounds in zip(*parts, strict=True))
            if len(times):
                colour = _LEVEL_COLOURS[number % len(_LEVEL_COLOURS)]
                lines.append((f"{server.name}, {level}", colour, index > 0, *_quantiles(times, weights)))
    left, width, bottom = 70, _WIDTH - 70 - 20, top + 20 + _HEIGHT
    elements = [text(20, top, f"{name}: share that took at most so long", bold=True)]
    elements.append(frame(left, bottom - _HEIGHT, width, _HEIGHT))
    elements += [
        text(left - 6, bottom - _HEIGHT + 10, "100%", size=10, end=True),
        text(left - 6, bottom, "0", size=10, end=True),
    ]
    if not lines:
        return elements, bottom + 40
    least = max(_SHORTEST, min(float(times[0]) for *_, times, _ in lines))
    decades = np.log10(max(2 * least, max(float(times[-1]) for *_, times, _ in lines)) / least)

    def x_of(seconds: float) -> float:
        return left + width * float(np.log10(max(seconds, least) / least) / decades)

    for tick in _ticks(least, least * 10**decades):
        elements.append(curve([(x_of(tick), bottom), (x_of(tick), bottom - _HEIGHT)], "#eee", ""))
        elements.append(text(x_of(tick) - 4, bottom + 13, f"{tick * 1e3:g} ms", size=10))
    x, below = float(left), bottom + 32
    for told, colour, dashed, times, shares in lines:
        points = [
            (x_of(float(time)), bottom - _HEIGHT * float(share)) for time, share in zip(times, shares, strict=True)
        ]
        elements.append(curve(points, colour, told, dashed=dashed))
        room = 40 + 6.5 * len(told)
        if x + room > _WIDTH:
            x, below = float(left), below + _ROW
        elements.append(curve([(x, below - 4), (x + 18, below - 4)], colour, told, dashed=dashed))
        elements.append(text(x + 23, below, told, size=11))
        x += room
    return elements, below + 2 * _ROW


def _quantiles(times: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_POINTS` of the times, in order, and the share that took no longer."""
    order = np.argsort(times)
    times, reached = times[order], np.cumsum(weights[order])
    at = np.unique(np.linspace(0, len(times) - 1, _POINTS).round().astype(int))
    return times[at], reached[at] / reached[-1]


def _ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 of each power of ten between the two."""
    powers = range(int(np.floor(np.log10(least))), int(np.ceil(np.log10(most))) + 1)
    return [tick for power in powers for digit in (1, 2, 5) if least <= (tick := digit * 10.0**power) <= most]
