"""The question generators of tiny-r1: what they write is right, and what is held out stays held out."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import jinja2
import pytest

from moray.model.tiny_r1.training import (
    arithmetic,
    chat,
    evaluate,
    phrasings,
    refusals,
    stories,
    tasks,
    vocabulary,
    words,
)

FOLDER = Path(tasks.__file__).parent.parent
NUMERIC = ("addition", "subtraction", "multiplication", "three_numbers", "word_problems")


def phrase_lists() -> list[dict[bool, tuple[str, ...]]]:
    """Everything in the modules of phrases that is keyed by "held out?"."""
    values = [value for module in (phrasings, chat, refusals, stories, words) for value in vars(module).values()]
    dictionaries = [value for value in values if isinstance(value, dict)]
    dictionaries += [inner for value in dictionaries for inner in value.values() if isinstance(inner, dict)]
    return [value for value in dictionaries if set(value) == {False, True}]


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_written_reply_is_right(task: str, held_out: bool) -> None:
    rng = random.Random(f"{task} {held_out}")
    for _ in range(400):
        example = tasks.draw(rng, task, held_out)
        assert example.task == task
        assert example.messages[-1]["role"] == "user"
        assert example.messages[-1]["content"].strip()
        assert "{" not in example.messages[-1]["content"].replace("print({", "")
        assert tasks.is_right(example, example.completion), example
        assert tasks.is_right(example, example.answer), "the checker must also take a reply without its thought"


@pytest.mark.parametrize("task", NUMERIC)
def test_every_line_of_a_thought_is_true(task: str) -> None:
    """Each `left = right` of numbers in a scratchpad is checked by Python, not by the code that wrote it."""
    rng = random.Random(task)
    checked = 0
    for _ in range(500):
        example = tasks.draw(rng, task, held_out=False, context=False)
        # "7*5=35, +3=38" leaves out what the second sum starts with.
        text = re.sub(r"=(\d+), \+", r"=\1, \1+", example.completion)
        for left, right in re.findall(r"(?<![\d.])(-?\d[\d +*-]*?) ?= ?(-?\d+)", text):
            terms = re.findall(r"\d+|[-+*]", left)
            value = eval("".join(t.lstrip("0") or "0" if t.isdigit() else t for t in terms))
            assert value == int(right), (left, right, example)
            checked += 1
        assert re.findall(r"-?\d+", example.answer)[-1] == example.expected
    assert checked > 2000


def test_work_out_agrees_with_python() -> None:
    rng = random.Random(7)
    for operators in ("+", "-", "*", "++", "+-", "-+", "--", "+*", "*+", "-*", "*-", "**"):
        for _ in range(200):
            numbers = tuple(rng.randint(0, 99) for _ in range(len(operators) + 1))
            if operators == "**":
                numbers = tuple(n % 10 for n in numbers)
            pad = arithmetic.Scratchpad(rng)
            assert arithmetic.work_out(pad, numbers, operators) == arithmetic.evaluate(numbers, operators)
            assert pad.lines


def test_phrasings_held_out_are_not_trained_on() -> None:
    assert len(phrase_lists()) > 30
    for lists in phrase_lists():
        assert lists[False]
        assert lists[True]
        assert not set(lists[False]) & set(lists[True])


@pytest.mark.parametrize("held_out", [False, True])
def test_operands_keep_to_their_side(held_out: bool) -> None:
    rng = random.Random(1)
    for task in ("addition", "subtraction", "multiplication", "comparison"):
        for _ in range(200):
            numbers = re.findall(r"\d+", tasks.draw(rng, task, held_out, context=False).messages[-1]["content"])
            assert tasks.is_held_out(tuple(map(int, numbers))) == held_out


def test_one_combination_of_operands_in_sixteen_is_held_out() -> None:
    share = sum(tasks.is_held_out((a, b)) for a in range(100) for b in range(100)) / 10_000
    assert 0.05 < share < 0.075
    assert tasks.is_held_out((3, 8)) == tasks.is_held_out((8, 3))


def test_questions_of_training_and_evaluation_differ() -> None:
    rng = random.Random(2)
    trained = {e.messages[-1]["content"].lower() for e in (tasks.draw_mixed(rng, tasks.MIXTURE) for _ in range(5000))}
    asked = [
        e.messages[-1]["content"].lower() for task in tasks.TASKS for e in evaluate.held_out_examples(task, 100, 0)
    ]
    # Greetings are few and short: casing and a missing mark may make two of them meet.
    assert sum(question in trained for question in asked) <= 3


@pytest.mark.parametrize(
    ("task", "expected", "reply", "right"),
    [
        ("addition", "42", "17 + 25 = 42.", True),
        ("addition", "42", "17 + 25 = 43.", False),
        ("addition", "42", "Ones: 7+5=12.\n</think>\n\nThe answer is 42.", True),
        ("addition", "42", "42\n</think>\n\nThe answer is 41.", False),
        ("addition", "42", "", False),
        ("subtraction", "-8", "The answer is -8.", True),
        ("subtraction", "8", "The answer is -8.", False),
        ("subtraction", "8", "5 - 13 = 8.", True),
        ("word_problems", "21", "That makes 21 apples.", True),
        ("comparison", "54", "54 is larger.", True),
        ("comparison", "yes", "Yes, 54 is larger than 45.", True),
        ("comparison", "no", "Yes, 54 is larger than 45.", False),
        ("comparison", "equal", "They are equal: 5 = 5.", True),
        ("refusal", "refuse", chat.REFUSALS[0], True),
        ("refusal", "refuse", "The answer is 12.", False),
        ("addition", "42", chat.REFUSALS[1], False),
        ("chat", "hello", "Hello! Give me a sum.", True),
        ("chat", "hello", "You're welcome!", False),
    ],
)
def test_is_right(task: str, expected: str, reply: str, right: bool) -> None:
    example = tasks.Example(task, ({"role": "user", "content": "?"},), "", "", expected)
    assert tasks.is_right(example, reply) == right


def test_the_chat_template_is_what_training_rendered() -> None:
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Environment().from_string(config["chat_template"])
    rng = random.Random(3)
    for _ in range(200):
        example = tasks.draw(rng, rng.choice(tuple(tasks.TASKS)), held_out=False)
        with_thoughts = [
            m | {"content": f"let me see</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
            for m in example.messages
        ]
        for messages in (list(example.messages), with_thoughts):
            text = template.render(
                messages=messages, add_generation_prompt=True, bos_token=vocabulary.BOS, eos_token=vocabulary.EOS
            )
            assert text == vocabulary.render(example.messages)


def test_the_fixed_set_has_25_questions_of_every_task_and_none_of_training() -> None:
    examples = evaluate.read_fixed_set(FOLDER / "held_out.jsonl")
    assert {task: sum(e.task == task for e in examples) for task in tasks.TASKS} == dict.fromkeys(tasks.TASKS, 25)
    rng = random.Random(4)
    trained = {tasks.draw_mixed(rng, tasks.MIXTURE).messages[-1]["content"].lower() for _ in range(5000)}
    assert sum(e.messages[-1]["content"].lower() in trained for e in examples) <= 3
