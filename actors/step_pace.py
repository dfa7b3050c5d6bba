"""How long steps take, learnt from those that ran; and how large they may be to stay below a target. Plain arithmetic.

A step takes so long for itself, so much more for each sequence that decodes, and so much for each prompt token. The three
costs follow what is measured in the smallest change that explains a part of the difference (normalised least mean squares):
near the sizes that steps have now, which is where the question is asked, they are right after some ten steps.
"""

from __future__ import annotations

_FOLLOWS = 0.2
"""Part of a difference that is explained at once: half of a change is learnt in three steps, and one odd step moves little."""

_DECODING_UNIT, _PROMPT_UNIT = 16.0, 64.0
"""Sequences and prompt tokens that are thought to cost about as much as the step itself, before anything was measured."""

_AIM = 0.85
"""Part of the target that is aimed at: steps of the same size vary, and it is the slow ones that must stay below it."""

_DECODING_SHARE = 0.7
"""Part of a step that decoding sequences may take where others wait; the rest is for the prompts of those that come."""

_LEAST_PROMPT_TOKENS = 4
"""So many prompt tokens a step are computed in any case, as prompts must move. Hardly more: each brings experts of its own into
a small step (of 64, top-8: 4 tokens 27, 16 tokens 57). Under overload the 99th percentile of the time
between tokens was 2.2 times that of one stream alone with 16 (a minute, aim 0.6), 1.96 with 4 (ten, aim 0.5; mid, on
`tests/bench/overload.py`)."""


class StepPace:
    """Bounds on steps, for a target.

    Args:
        target_s: seconds that a step should take at most while requests are being answered.
    """

    def __init__(self, target_s: float) -> None:
        self.target_s = target_s
        self._step = self._decoding = self._prompt = 0.0  # seconds: of a step, and more for each unit
        self._most_decoding = 0
        self._steps = 0

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step with so many decoding sequences and prompt tokens took `seconds`."""
        more_decoding, more_prompt = decoding / _DECODING_UNIT, prompt_tokens / _PROMPT_UNIT
        expected = self._step + self._decoding * more_decoding + self._prompt * more_prompt
        # Of a prompt alone a step takes so long for the prompt: what its time varies by would be several answers' worth.
        itself = 1.0 if decoding or not self._steps else 0.0
        if not itself and not more_prompt:
            return
        follows = _FOLLOWS
        if not self._steps:
            follows = 1.0
        else:
            seconds = min(seconds, 2 * expected)  # what held a step up longer than that is not its size
        gain = follows * (seconds - expected) / (itself + more_decoding**2 + more_prompt**2)
        self._step = max(0.0, self._step + itself * gain)
        self._decoding = max(0.0, self._decoding + gain * more_decoding)
        self._prompt = max(0.0, self._prompt + gain * more_prompt)
        self._most_decoding = max(self._most_decoding, decoding)
        self._steps += 1

    def decoding_s(self, sequences: int) -> float:
        """What a step without prompts is thought to take."""
        return self._step + self._decoding * sequences / _DECODING_UNIT

    def prompt_tokens(self, decoding: int) -> int | None:
        """How many prompt tokens a step may have beside `decoding` sequences; None where nothing is known yet."""
        room_s = _AIM * self.target_s - self.decoding_s(decoding)
        if room_s <= 0:
            return _LEAST_PROMPT_TOKENS
        if not self._prompt:
            return None
        return max(_LEAST_PROMPT_TOKENS, int(_PROMPT_UNIT * room_s / self._prompt))

    def sequences(self) -> int:
        """How many sequences may decode at once; at least 1, and at most one more than ever did: what more cost is not known,
        and each that is let in stays until its answer ends."""
        known = self._most_decoding + 1
        room_s = _DECODING_SHARE * _AIM * self.target_s - self._step
        if room_s <= 0:
            return 1
        if not self._decoding:
            return known
        return max(1, min(known, int(_DECODING_UNIT * room_s / self._decoding)))
