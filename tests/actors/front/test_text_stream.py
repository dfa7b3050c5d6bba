"""Detokenizing, stop strings and the thought: cutting the input differently never changes the output."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moray.actors.front.answer import Answer, AnswerDelta
from moray.actors.front.http_errors import EngineFailedError
from moray.actors.front.testing import made_up_logprobs
from moray.actors.front.text_stream import Detokenizer, ReasoningSplitter, SplitText, StopMatcher
from moray.actors.messages import TokenOutput
from moray.model.tokenizer import Tokenizer

TEXT = st.text(alphabet="ab<>/think\n é🙂", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n é🙂<>/th", min_size=1, max_size=4), max_size=3)


def cut(text: str, sizes: list[int]) -> list[str]:
    """`text` in pieces of these sizes, round and round; sizes may be 0."""
    pieces = []
    number = 0
    while text:
        size = sizes[number % len(sizes)] if any(sizes) else 1
        pieces.append(text[:size])
        text = text[size:]
        number += 1
    return pieces


SIZES = st.lists(st.integers(min_value=0, max_value=7), min_size=1, max_size=5)


def truncated(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, spelt out: the first stop string to be complete ends the text before its first character."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


# --- characters over token borders


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.feed(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🙂"]
    assert detokenizer.flush() == ""


def test_a_character_that_never_ends_is_marked(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    (*most, _) = tokenizer.encode("🙂", add_special_tokens=False)
    assert "".join(map(detokenizer.feed, most)) + detokenizer.flush() == "\ufffd"


@given(ids=st.lists(st.integers(min_value=0, max_value=330), max_size=30))
def test_detokenizing_in_pieces_is_decoding(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.feed, ids)) + detokenizer.flush() == tokenizer.decode(ids)


# --- stop strings


@given(text=TEXT, stops=STOPS, sizes=SIZES)
@example(text="abc", stops=["abcd", "c"], sizes=[1])
@example(text="aab", stops=["ab"], sizes=[2])
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stops)
    pieces = [matcher.feed(piece) for piece in cut(text, sizes)]
    pieces.append(matcher.flush())
    assert ("".join(pieces), matcher.stopped) == truncated(text, stops)


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the E") == "the "
    assert matcher.feed("N") == ""
    assert matcher.feed("T") == "ENT"
    assert matcher.feed("..END more") == ".."
    assert matcher.stopped
    assert matcher.feed("later") == matcher.flush() == ""


# --- the thought


def split(text: str, sizes: list[int], *, opened: bool) -> SplitText:
    splitter = ReasoningSplitter(opened=opened)
    pieces = [splitter.feed(piece) for piece in cut(text, sizes)]
    pieces.append(splitter.flush())
    return SplitText("".join(p.reasoning for p in pieces), "".join(p.content for p in pieces))


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("so 7\n</think>\n\nIt is 7.", True, "so 7", "It is 7."),
        ("\n\nso\n\n7\n\n</think>7\n", True, "so\n\n7", "7\n"),
        ("<think>\nso 7\n</think>\n\nIt is 7.", True, "so 7", "It is 7."),
        ("<think>\nso 7\n</think>\n\nIt is 7.", False, "so 7", "It is 7."),
        (" \n<think>so", False, "so", ""),
        ("\n\n</think>\n\nhello", True, "", "hello"),
        ("still thinking\n", True, "still thinking", ""),
        ("a </thin b", True, "a </thin b", ""),
        ("a\n</thi", True, "a\n</thi", ""),
        ("x</think>y</think>z", True, "x", "y</think>z"),
        ("plain answer", False, "", "plain answer"),
        ("\n plain <think>x</think>", False, "", "\n plain <think>x</think>"),
        ("no thought</think>here", False, "", "no thought</think>here"),
        ("<thi", False, "", "<thi"),
        ("<thi", True, "<thi", ""),
        ("\n\n", False, "", "\n\n"),
        ("\n\n", True, "", ""),
        ("", True, "", ""),
    ],
)
@pytest.mark.parametrize("sizes", [[1], [2, 3], [1000]], ids=["by one", "by two and three", "whole"])
def test_the_thought_is_taken_out(text: str, opened: bool, reasoning: str, content: str, sizes: list[int]) -> None:
    assert split(text, sizes, opened=opened) == SplitText(reasoning, content)


@given(text=TEXT, sizes=SIZES, opened=st.booleans(), closed=st.booleans())
def test_splitting_in_pieces_is_splitting_the_whole(text: str, sizes: list[int], opened: bool, closed: bool) -> None:
    text = text + "</think>\n" + text if closed else text
    assert split(text, sizes, opened=opened) == split(text, [max(1, len(text))], opened=opened)


def test_content_is_not_held_back() -> None:
    splitter = ReasoningSplitter(opened=True)
    assert splitter.feed("a\n") == SplitText(reasoning="a")
    assert splitter.feed("b</th") == SplitText(reasoning="\nb")
    assert splitter.feed("ink>") == SplitText()
    assert splitter.thought_end == len("a\nb</think>")
    assert splitter.feed("\n\nc\n") == SplitText(content="c\n")


# --- all of it together


def run(answer: Answer, tokens: list[int], sizes: list[int], finish: str = "stop") -> list[AnswerDelta]:
    """Feed tokens in outputs of these sizes, as an engine would, until the answer ends."""
    groups: list[list[int]] = []
    rest = list(tokens)
    while rest:
        size = sizes[len(groups) % len(sizes)] if any(sizes) else 1
        groups.append(rest[:size])
        rest = rest[size:]
    groups = groups or [[]]
    deltas = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        logprobs = [made_up_logprobs(token_id, 2) for token_id in group]
        deltas.append(answer.feed(TokenOutput("r", group, logprobs, finish if last else None)))  # type: ignore[arg-type]
        if deltas[-1].finish_reason is not None:
            break
    return deltas


@given(text=TEXT, stops=STOPS, sizes=SIZES, opened=st.booleans(), finish=st.sampled_from(["stop", "length"]))
@example(text="x</think>\nb", stops=[">\nb"], sizes=[1], opened=True, finish="length")
def test_an_answer_does_not_depend_on_how_tokens_arrive(
    tokenizer: Tokenizer, text: str, stops: list[str], sizes: list[int], opened: bool, finish: str
) -> None:
    # One token per byte, so that characters and stop strings are cut at every place; `</think>` stays one token.
    tokens: list[int] = []
    for number, part in enumerate(text.split("/think")):
        tokens += tokenizer.encode("</think>", add_special_tokens=False) if number else []
        for byte in part.encode():
            tokens.append(next(t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) == bytes([byte])))
    text = text.replace("/think", "</think>")
    expected, stopped = truncated(text, stops)

    answer = Answer(tokenizer, stops=stops, splitter=ReasoningSplitter(opened=opened), wants_logprobs=True)
    deltas = run(answer, tokens, sizes, finish)
    reasoning, content = "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)
    assert SplitText(reasoning, content) == split(expected, [1000], opened=opened)
    assert deltas[-1].finish_reason == ("stop" if stopped else finish)
    assert not any(stop in reasoning or stop in content for stop in stops)

    plain = Answer(tokenizer, stops=stops, wants_logprobs=True)
    assert "".join(delta.content for delta in run(plain, tokens, sizes, finish)) == expected

    alone = Answer(tokenizer, stops=stops, splitter=ReasoningSplitter(opened=opened), wants_logprobs=True)
    one_by_one = run(alone, tokens, [1], finish)
    used = [token_id for delta in one_by_one for token_id in delta.token_ids]
    assert [token_id for delta in deltas for token_id in delta.token_ids] == used
    assert [entry for delta in deltas for entry in delta.logprobs] == [
        entry for delta in one_by_one for entry in delta.logprobs
    ]
    assert answer.completion_tokens == alone.completion_tokens == len(used)
    assert answer.reasoning_tokens == alone.reasoning_tokens


def test_reasoning_tokens_are_counted_up_to_the_end_of_the_thought(tokenizer: Tokenizer) -> None:
    def count(text: str, *, opened: bool, stops: tuple[str, ...] = ()) -> tuple[int, int]:
        answer = Answer(tokenizer, stops=stops, splitter=ReasoningSplitter(opened=opened))
        answer.feed(TokenOutput("r", tokenizer.encode(text, add_special_tokens=False), None, "stop"))
        return answer.reasoning_tokens, answer.completion_tokens

    length = {text: len(tokenizer.encode(text, add_special_tokens=False)) for text in ("ab\n", "ok", "</think>")}
    assert length["</think>"] == 1
    assert count("ab\n</think>ok", opened=True) == (length["ab\n"] + 1, length["ab\n"] + 1 + length["ok"])
    assert count("<think>ab\n</think>ok", opened=False)[0] == length["ab\n"] + 2
    assert count("ab\n", opened=True) == (length["ab\n"],) * 2
    assert count("ok", opened=False)[0] == 0
    assert count("ab\n</think>ok</think>", opened=True, stops=("ok</think>!",))[0] == length["ab\n"] + 1


def test_logprobs_do_not_leak_a_stop_string(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, stops=["NOW"], wants_logprobs=True)
    tokens = [token_id for word in ("go ", "N", "O", "W", "x") for token_id in tokenizer.encode(word)[1:]]
    deltas = run(answer, tokens, [1])
    shown = b"".join(tokenizer.token_bytes(entry.token_id) for delta in deltas for entry in delta.logprobs)
    assert shown == b"go "
    assert answer.completion_tokens == len(tokens) - 1


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_an_engine_that_gives_up_is_an_error(tokenizer: Tokenizer, reason: str, status: int) -> None:
    with pytest.raises(EngineFailedError) as caught:
        Answer(tokenizer).feed(TokenOutput("r", [], None, reason, "out of luck"))  # type: ignore[arg-type]
    assert (str(caught.value), caught.value.status) == ("out of luck", status)


def test_missing_logprobs_are_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineFailedError, match="0 log-probabilities for 1 token"):
        Answer(tokenizer, wants_logprobs=True).feed(TokenOutput("r", [5]))
