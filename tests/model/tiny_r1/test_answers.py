"""The embedded model as it is served: every task it claims, with numbers and phrasings it was not trained on."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Literal, cast

import pytest

from moray import LLM
from moray.model import tiny_r1
from moray.model.tiny_r1.training.tasks import Example, is_right
from moray.model.tokenizer import ChatMessage

REQUIRED = 0.95

Role = Literal["system", "user", "assistant"]


def asked(task: str, messages: list[dict[str, str]], expected: str) -> Example:
    """A question with what counts as right; how the model gets there is its own affair."""
    return Example(task, tuple(messages), thought="", answer="", expected=expected)


@pytest.fixture(scope="module")
def replies() -> dict[str, list[tuple[Example, str]]]:
    """The model's greedy reply to every held-out question, by task."""
    lines = (Path(tiny_r1.__path__[0]) / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [asked(**json.loads(line)) for line in lines]
    with LLM("tiny-r1", experts=2) as llm:
        tokenizer = llm.cluster.model.tokenizer
        prompts = [
            tokenizer.apply_chat_template(
                [ChatMessage(cast(Role, m["role"]), m["content"]) for m in e.messages]
            ).token_ids
            for e in examples
        ]
        answers = llm.generate(prompts, temperature=0, max_tokens=400)
    by_task = defaultdict(list)
    for example, answer in zip(examples, answers, strict=True):
        by_task[example.task].append((example, answer.text))
    return dict(by_task)


def test_at_least_95_percent_of_every_task(replies: dict[str, list[tuple[Example, str]]]) -> None:
    wrong = {
        task: [f"{e.messages[-1]['content']!r} -> {text!r}" for e, text in answered if not is_right(e, text)]
        for task, answered in replies.items()
    }
    failing = {task: w for task, w in wrong.items() if len(w) > (1 - REQUIRED) * len(replies[task])}
    assert not failing, failing


@pytest.mark.parametrize(
    "question",
    [
        "What is the capital of France?",
        "What is 15% of 80?",
        "Write a poem about the sea",
        "What is 7 divided by 2?",
    ],
)
def test_says_what_it_cannot_do(question: str) -> None:
    with LLM("tiny-r1") as llm:
        answer = llm.generate([question], temperature=0)[0].text
    assert is_right(asked("refusal", [{"role": "user", "content": question}], "refuse"), answer), answer


@pytest.mark.parametrize(
    ("question", "number"),
    [
        ("What is 17 + 25?", 42),
        ("what's 12*12", 144),
        ("If I have 3 bags with 7 apples each, how many apples do I have?", 21),
        ("Tom has 45 marbles and gives 18 to Ann. How many are left?", 27),
    ],
)
def test_answers_what_a_stranger_types(question: str, number: int) -> None:
    with LLM("tiny-r1") as llm:
        answer = llm.generate([question], temperature=0)[0]
    assert str(number) in answer.text.replace(".", " ").split(), answer.text
    assert answer.reasoning, "it thinks first"
