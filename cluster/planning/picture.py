"""A plan as a picture: the memory of every device, and what a step's time goes to. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..svg import bar, document, frame, text
from .footprint import (
    ACTIVATIONS,
    BUFFERS,
    CONTEXT,
    KV_PAGES,
    PROCESS,
    SCALES,
    SERVICES,
    WEIGHTS,
    Device,
)
from .plan import Plan
from .report import alike
from .step_cost import Span, StepCost

_WIDTH = 960
_LEFT = 250
_RIGHT = 110
_BAR = 16
_ROW = 22
_MOST_CHARACTERS = 40  # of a label, so that it ends before the bars
_MOST_BARS = 40
"""More devices than these are shown one of a kind."""

_COLOURS = {
    WEIGHTS: "#4269d0",
    SCALES: "#97bbf5",
    KV_PAGES: "#3ca951",
    BUFFERS: "#efb118",
    ACTIVATIONS: "#ff8ab7",
    CONTEXT: "#9c6b4e",
    PROCESS: "#9c6b4e",
    SERVICES: "#9498a0",
}
_PHASE_COLOURS = {
    "attention and gate": "#4269d0",
    "dense layers": "#97bbf5",
    "dispatch": "#efb118",
    "experts": "#3ca951",
    "combine": "#ff725c",
    "shared experts": "#a463f2",
    "head": "#6cc5b0",
    "waiting for hosts": "#9498a0",
}
_LANES = ("router", "links", "busiest host")
_LANE_OF = {"attention and gate": 0, "shared experts": 0, "dispatch": 1, "combine": 1, "experts": 2}


class _Canvas:
    """Elements from top to bottom."""

    def __init__(self) -> None:
        self.y = 0.0
        self._elements: list[str] = []

    def text(
        self, x: float, words: str, *, size: int = 12, bold: bool = False, end: bool = False, down: float = 12
    ) -> None:
        self._elements.append(text(x, self.y + down, words, size=size, bold=bold, end=end))

    def bar(self, x: float, width: float, colour: str, title: str, *, opacity: float = 1.0) -> None:
        self._elements.append(bar(x, self.y, width, _BAR, colour, title, opacity=opacity))

    def frame(self, x: float, width: float) -> None:
        self._elements.append(frame(x, self.y, width, _BAR, "#888"))

    def legend(self, colours: Iterable[tuple[str, str]]) -> None:
        x = 20.0
        for name, colour in colours:
            width = 28 + 7.0 * len(name)
            if x + width > _WIDTH:
                self.y, x = self.y + _ROW, 20.0
            self.bar(x, 12, colour, name)
            self.text(x + 17, name)
            x += width
        self.y += 1.5 * _ROW

    def document(self, title: str) -> str:
        return document(_WIDTH, self.y + _ROW, title, self._elements)


def draw(plan: Plan) -> str:
    """The picture as an SVG document: a bar for each device, then, where the model fits, a step at each batch size."""
    canvas = _Canvas()
    title = (
        f"{plan.model} on {', '.join(str(group) for group in plan.groups)}: {'fits' if plan.fits else 'does not fit'}"
    )
    canvas.y = 12
    canvas.text(20, title, size=16, bold=True)
    canvas.y += 1.5 * _ROW
    _memory(canvas, plan)
    if plan.steps:
        _layer(canvas, next((step for step in reversed(plan.steps) if not step.notes), plan.steps[-1]))
        _steps(canvas, plan.steps)
    return canvas.document(title)


def _memory(canvas: _Canvas, plan: Plan) -> None:
    devices = plan.layout.devices
    rows: list[tuple[str, Device]] = [(device.name, device) for device in devices]
    if len(rows) > _MOST_BARS:
        rows = [(f"{len(kind)} like {kind[0].name}", max(kind, key=lambda d: d.used)) for kind in alike(devices)]
    canvas.text(20, "memory of each device", bold=True)
    canvas.y += _ROW
    canvas.legend((name, colour) for name, colour in _COLOURS.items() if name in _present(devices))
    longest = max(max(device.capacity or 0, device.used) for _, device in rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    for name, device in rows:
        who = ", ".join(process.id for process in device.processes[:2]) + (", ..." if len(device.processes) > 2 else "")
        canvas.text(20, _short(f"{name}: {who or 'nothing'}"), size=11)
        x = float(_LEFT)
        for what, count in _segments(device):
            canvas.bar(x, count * scale, _COLOURS.get(what, "#9498a0"), f"{what}: {count / 1e9:.2f} GB")
            x += count * scale
        if device.capacity is not None:
            canvas.frame(_LEFT, device.capacity * scale)
        of = "" if device.capacity is None else f" / {device.capacity / 1e9:.1f}"
        canvas.text(_WIDTH - 8, f"{device.used / 1e9:.1f}{of} GB", size=11, end=True)
        canvas.y += _ROW
    canvas.y += _ROW


def _layer(canvas: _Canvas, step: StepCost) -> None:
    """One MoE layer as a timeline, a lane for each place where something happens."""
    canvas.text(20, f"one MoE layer of a step of {step.batch} requests, to the busiest host and back", bold=True)
    canvas.y += 1.5 * _ROW
    whole = sum(span.seconds for span in step.layer)
    scale = (_WIDTH - _LEFT - _RIGHT) / whole
    top = canvas.y
    for index, lane in enumerate(_LANES):
        canvas.y = top + index * _ROW
        canvas.text(20, lane, size=11)
    x = float(_LEFT)
    for span in step.layer:
        canvas.y = top + _LANE_OF[span.phase] * _ROW
        canvas.bar(x, span.seconds * scale, _PHASE_COLOURS[span.phase], _told(span))
        x += span.seconds * scale
        if span.phase == "attention and gate" and step.shared_s:
            told = f"shared experts, beside the others: {step.shared_s * 1e6:.0f} us"
            canvas.bar(
                x,
                min(step.shared_s * scale, _LEFT + whole * scale - x),
                _PHASE_COLOURS["shared experts"],
                told,
                opacity=0.6,
            )
    canvas.y = top
    canvas.text(_WIDTH - 8, f"{whole * 1e6:.0f} us", size=11, end=True)
    canvas.y = top + (len(_LANES) + 1) * _ROW


def _steps(canvas: _Canvas, steps: Sequence[StepCost]) -> None:
    canvas.text(20, "one decode step at each number of requests", bold=True)
    canvas.y += _ROW
    present = {phase for step in steps for phase in step.phases}
    canvas.legend((name, colour) for name, colour in _PHASE_COLOURS.items() if name in present)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(step.seconds for step in steps)
    for step in steps:
        canvas.text(20, f"{step.batch} requests, {step.tokens_in_all:.0f} tokens/s", size=11)
        x = float(_LEFT)
        for phase, colour in _PHASE_COLOURS.items():
            seconds = step.phases.get(phase, 0.0)
            if seconds:
                canvas.bar(x, seconds * scale, colour, f"{phase}: {seconds * 1e3:.2f} ms")
                x += seconds * scale
        canvas.text(_WIDTH - 8, f"{step.seconds * 1e3:.1f} ms", size=11, end=True)
        canvas.y += _ROW


def _short(label: str) -> str:
    return label if len(label) <= _MOST_CHARACTERS else label[: _MOST_CHARACTERS - 3] + "..."


def _told(span: Span) -> str:
    return f"{span.phase}: {span.seconds * 1e6:.0f} us, bound by {span.resource}"


def _segments(device: Device) -> list[tuple[str, int]]:
    return [*device.fixed.items(), *(part for process in device.processes for part in process.memory.items())]


def _present(devices: Sequence[Device]) -> set[str]:
    return {name for device in devices for name, count in _segments(device) if count}
