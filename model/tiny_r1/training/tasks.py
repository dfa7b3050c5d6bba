"""The tasks tiny-r1 claims: how a question is drawn, how it is thought through, and when a reply is right.

Two things are held out of training: operands (one combination in sixteen, by CRC) and phrasings (the `True` half of
every phrase list). An evaluation question uses held-out operands in held-out phrasing.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from . import chat, phrasings, refusals
from .arithmetic import Scratchpad, evaluate, work_out
from .stories import write_story
from .words import blur, made_up_word

THINK_END = "</think>"
Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One question with the reply the model should give."""

    task: str
    messages: tuple[Message, ...]  # roles system / user / assistant; the last one is the user's question
    thought: str  # between <think>\n and \n</think>
    answer: str  # the final sentence
    expected: str  # what is_right looks for: a number, yes / no / equal, a chat intent, or "refuse"

    @property
    def completion(self) -> str:
        """The text the model must produce after the prompt's `<think>\\n`, without the end token."""
        return f"{self.thought}\n{THINK_END}\n\n{self.answer}"


def is_held_out(numbers: tuple[int, ...]) -> bool:
    """True for the one combination of operands in sixteen that training never shows, in any order, for any task."""
    return zlib.crc32(",".join(map(str, sorted(numbers))).encode()) % 16 == 0


def _number(rng: random.Random, *weights: float) -> int:
    """A number with 1, 2, 3... digits; weights[i] is how often it has i + 1 digits."""
    digits = rng.choices(range(1, len(weights) + 1), weights)[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _draw(held_out: bool, make: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """Draw operands until they are on the wanted side of the hold-out."""
    while True:
        numbers = make()
        if is_held_out(numbers) == held_out:
            return numbers


def _question(task: str, text: str, thought: str, answer: str, expected: object) -> Example:
    return Example(task, ({"role": "user", "content": text},), thought, answer, str(expected))


def _expression(numbers: tuple[int, ...], operators: str) -> str:
    return str(numbers[0]) + "".join(f" {op} {n}" for op, n in zip(operators, numbers[1:], strict=True))


def _calculation(rng: random.Random, task: str, numbers: tuple[int, ...], operators: str, held_out: bool) -> Example:
    text = phrasings.ask_expression(rng, numbers, operators, held_out)
    expression = _expression(numbers, operators)
    pad = Scratchpad(rng)
    pad.say(
        rng.choice(("This is {}.", "This is {}.", "I need {}.", "The question is {}.", "Let me work out {}.")).format(
            expression
        )
    )
    result = work_out(pad, numbers, operators)
    answer = rng.choice((f"{expression} = {result}.", f"{expression} = {result}.", f"The answer is {result}."))
    return _question(task, text, pad.text(), answer, result)


def _addition(rng: random.Random, held_out: bool) -> Example:
    numbers = _draw(held_out, lambda: (_number(rng, 0.2, 0.4, 0.4), _number(rng, 0.2, 0.4, 0.4)))
    return _calculation(rng, "addition", numbers, "+", held_out)


def _subtraction(rng: random.Random, held_out: bool) -> Example:
    def make() -> tuple[int, ...]:
        a, b = _number(rng, 0.15, 0.4, 0.45), _number(rng, 0.25, 0.4, 0.35)
        if rng.random() < 0.15:  # close numbers: the comparison has to look past the first digit
            b = max(0, a + rng.randint(-9, 9))
        return (a, min(b, 999)) if a >= b or rng.random() < 0.5 else (b, a)

    return _calculation(rng, "subtraction", _draw(held_out, make), "-", held_out)


def _factors(rng: random.Random, *weights: float) -> tuple[int, int]:
    """Two factors of 1x1, 2x1, 2x2 or 3x1 digits, with these weights, in either order."""
    first, second = rng.choices(((1, 1), (2, 1), (2, 2), (3, 1))[: len(weights)], weights)[0]
    factors = [_number(rng, *(float(i == digits - 1) for i in range(3))) for digits in (first, second)]
    rng.shuffle(factors)
    return factors[0], factors[1]


def _multiplication(rng: random.Random, held_out: bool) -> Example:
    numbers = _draw(held_out, lambda: _factors(rng, 0.2, 0.25, 0.43, 0.12))
    return _calculation(rng, "multiplication", numbers, "*", held_out)


def _three_numbers(rng: random.Random, held_out: bool) -> Example:
    operators = rng.choices(
        ("++", "+-", "-+", "--", "+*", "*+", "-*", "*-", "**"), (0.2, 0.13, 0.13, 0.07, 0.13, 0.11, 0.08, 0.1, 0.05)
    )[0]

    def make() -> tuple[int, ...]:
        if operators == "**":
            return rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
        if "*" in operators:
            a, b = _factors(rng, 0.3, 0.5, 0.2)
            c = _number(rng, 0.3, 0.5, 0.2)
            return (c, a, b) if operators[1] == "*" else (a, b, c)
        weights = (0.3, 0.45, 0.25)
        return _number(rng, *weights), _number(rng, *weights), _number(rng, *weights)

    return _calculation(rng, "three_numbers", _draw(held_out, make), operators, held_out)


_STORY_READINGS = {
    "+": ("Both together: {}.", "More come in: {}.", "This is {}."),
    "-": ("What is left: {}.", "I take away: {}.", "This is {}."),
    "*": ("Equal groups: {}.", "So many times: {}.", "This is {}."),
    "": ("One after the other: {}.", "This is {}."),
}


def _word_problem(rng: random.Random, held_out: bool) -> Example:
    operators = rng.choices(("+", "-", "*", "++", "+-", "-+", "--"), (0.23, 0.27, 0.3, 0.04, 0.07, 0.05, 0.04))[0]

    def make() -> tuple[int, ...]:
        if operators == "*":
            return _factors(rng, 0.4, 0.4, 0.2)
        weights = (0.3, 0.55, 0.15)
        while True:
            numbers = tuple(_number(rng, *weights) for _ in range(len(operators) + 1))
            running = [evaluate(numbers[: i + 1], operators[:i]) for i in range(len(numbers))]
            if min(running) >= 0 and min(numbers) > 0:
                return numbers

    numbers = _draw(held_out, make)
    story = write_story(rng, numbers, operators, held_out)
    pad = Scratchpad(rng)
    readings = _STORY_READINGS[operators if len(operators) == 1 else ""]
    pad.say(rng.choice(readings).format(_expression(numbers, operators)))
    result = work_out(pad, numbers, operators)
    text = blur(rng, story.text) if not held_out and rng.random() < 0.3 else story.text
    text = phrasings.decorate(rng, text, held_out) if rng.random() < 0.5 else text
    answer = rng.choice((f"The answer is {result}.", f"That makes {result}."))
    return _question("word_problems", text, pad.text(), answer, result)


def _comparison(rng: random.Random, held_out: bool) -> Example:
    def make() -> tuple[int, ...]:
        x, y = _number(rng, 0.2, 0.4, 0.4), _number(rng, 0.2, 0.4, 0.4)
        if not held_out and rng.random() < 0.08:
            return x, x  # by chance equal numbers come up too seldom to learn what they look like
        if rng.random() < 0.35:
            y = min(999, max(0, x + rng.choice((0, 1, -1, 10, -10, rng.randint(-20, 20), rng.randint(-99, 99)))))
        return x, y

    x, y = _draw(held_out, make)
    larger = rng.random() < 0.6
    word = "larger" if larger else "smaller"
    pad = Scratchpad(rng)
    pad.say(f"Which is {word}?")
    sign = pad.compare(x, y)
    yes_no = rng.random() < 0.35
    if yes_no:
        lists = phrasings.COMPARE_YES_NO_LARGER if larger else phrasings.COMPARE_YES_NO_SMALLER
        true = sign == (1 if larger else -1)
        expected: object = "yes" if true else "no"
        relation = ("smaller than", "equal to", "larger than")[sign + 1]
        answer = f"{'Yes' if true else 'No'}, {x} is {relation} {y}."
    else:
        lists = phrasings.COMPARE_LARGER if larger else phrasings.COMPARE_SMALLER
        expected = "equal" if sign == 0 else (max(x, y) if larger else min(x, y))
        answer = f"They are equal: {x} = {y}." if sign == 0 else f"{expected} is {word}."
    text = phrasings.decorate(rng, rng.choice(lists[held_out]).format(x=x, y=y), held_out)
    return _question("comparison", text, pad.text(), answer, expected)


def _chat(rng: random.Random, held_out: bool) -> Example:
    intent = rng.choice(tuple(chat.ASKS))
    text = rng.choice(chat.ASKS[intent][held_out])
    if not held_out and rng.random() < 0.3:  # two ways to say it in one breath: what counts is in either half
        second = rng.choice(chat.ASKS[intent][held_out])
        text = text.rstrip("!?.") + rng.choice((", ", "! ", " and ", ". ", "? ")) + second[0].lower() + second[1:]
    if rng.random() < 0.5:
        text = text.lower() if rng.random() < 0.5 else text.rstrip("!?.")
    if not held_out and rng.random() < 0.2:
        text = text.rstrip("!?.") + rng.choice(
            (" please", ", please", " friend", ", bot", " again", " then", ", tiny", " now")
        )
        text += rng.choice(("", "!", "?", "."))
    thought = rng.choice(chat.THOUGHTS[intent])
    return _question("chat", text, thought, rng.choice(chat.REPLIES[intent]), intent)


def _refusal(rng: random.Random, held_out: bool) -> Example:
    text = (refusals.near_miss if rng.random() < 0.55 else refusals.elsewhere)(rng, held_out)
    return _question("refusal", text, rng.choice(chat.REFUSAL_THOUGHTS), rng.choice(chat.REFUSALS), "refuse")


TASKS: dict[str, Callable[[random.Random, bool], Example]] = {
    "chat": _chat,
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "three_numbers": _three_numbers,
    "word_problems": _word_problem,
    "comparison": _comparison,
    "refusal": _refusal,
}

# Share of the examples drawn in training: more for what takes longest to learn.
MIXTURE = {
    "chat": 0.19,
    "addition": 0.08,
    "subtraction": 0.08,
    "multiplication": 0.12,
    "three_numbers": 0.12,
    "word_problems": 0.13,
    "comparison": 0.08,
    "refusal": 0.20,
}


def draw(rng: random.Random, task: str, held_out: bool, context: bool = True) -> Example:
    """One example of a task; with `context`, one in six follows earlier turns and one in ten a system prompt."""
    example = TASKS[task](rng, held_out)
    if not context:
        return example
    before: list[Message] = []
    if rng.random() < 0.1:
        made_up = " ".join(made_up_word(rng) for _ in range(rng.randint(3, 9))).capitalize() + "."
        content = made_up if rng.random() < 0.4 and not held_out else rng.choice(chat.SYSTEM_PROMPTS)
        before.append({"role": "system", "content": content})
    for _ in range(rng.choices((0, 1, 2, 3), (0.84, 0.10, 0.04, 0.02))[0]):
        earlier = TASKS[rng.choice(tuple(TASKS))](rng, held_out)
        before += [*earlier.messages, {"role": "assistant", "content": earlier.answer}]
    return Example(example.task, (*before, *example.messages), example.thought, example.answer, example.expected)


def draw_mixed(rng: random.Random, mixture: dict[str, float]) -> Example:
    """One training example, its task drawn from the mixture."""
    return draw(rng, rng.choices(tuple(mixture), tuple(mixture.values()))[0], held_out=False)


def is_right(example: Example, reply_text: str) -> bool:
    """Whether a reply (with or without its thought) answers the example; only the text after `</think>` counts."""
    reply = reply_text.rsplit(THINK_END, 1)[-1].strip()
    refused = "can't" in reply and chat.CAN_DO in reply
    if example.expected == "refuse":
        return refused
    if refused or not reply:
        return False
    if example.task == "chat":
        return any(word in reply for word in chat.KEYWORDS[example.expected])
    if example.expected in ("yes", "no"):
        return reply.lower().startswith(example.expected)
    if example.expected == "equal":
        return "equal" in reply
    numbers = re.findall(r"(?<![\w])-?\d+", reply)
    return bool(numbers) and numbers[-1] == example.expected
