"""What a server is asked: the same for the same seed, lengths as given, traces as they are published."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from moray.cluster.bench.workload import Ask, Level, Turn, Workload, read_trace
from moray.cluster.simulation.trace import Even, Fixed
from moray.configs.errors import ConfigError


def workload(**changes: Any) -> Workload:
    return Workload(
        **{
            "prompt": Even(4, 9),
            "output": Fixed(5),
            "trace": None,
            "shared_prefix": 0,
            "vocab_size": 500,
            "seed": 1,
            **changes,
        }
    )


def some(of: Workload, form: Any = "ids", name: str = "a", count: int = 20) -> list[Ask]:
    return list(itertools.islice(of.asks(form, name), count))


def test_ids_follow_from_seed_and_name() -> None:
    asks = some(workload())
    assert asks == some(workload())
    assert {len(ask.prompt) for ask in asks} == set(range(4, 10))
    assert all(ask.prompt_tokens == len(ask.prompt) and ask.output_tokens == 5 for ask in asks)
    assert {type(token) for ask in asks for token in ask.prompt} == {int}
    assert all(100 <= int(token) < 500 for ask in asks for token in ask.prompt)
    for others in (some(workload(seed=2)), some(workload(), name="b")):
        assert all(a.prompt[:2] != b.prompt[:2] for a, b in zip(asks, others, strict=True)), "no common beginning"


def test_a_prefix_is_shared_within_a_name_only() -> None:
    asks, others = some(workload(shared_prefix=30)), some(workload(shared_prefix=30), name="b")
    assert len({tuple(ask.prompt[:30]) for ask in asks}) == 1
    assert len({tuple(ask.prompt) for ask in asks}) == len(asks)
    assert asks[0].prompt[:4] != others[0].prompt[:4]
    assert asks[0].prompt_tokens == len(asks[0].prompt)


def test_text_is_as_long_as_the_server_s_tokens() -> None:
    asks = some(workload(prompt=Fixed(100), shared_prefix=10, characters_per_token=2.5), form="text")
    assert {len(ask.prompt) for ask in asks} == {275}
    assert all(isinstance(ask.prompt, str) and " " in ask.prompt for ask in asks)
    assert len({ask.prompt for ask in asks}) == len(asks)


def test_arrivals_come_at_the_rate() -> None:
    of = workload()
    asks = list(itertools.islice(of.arrivals(of.asks("ids", "a"), 50.0, "a"), 2000))
    times = [ask.at for ask in asks if ask.at is not None]
    assert times == sorted(times)
    assert 38 < times[-1] < 42
    again = itertools.islice(of.arrivals(of.asks("ids", "a"), 50.0, "a"), 2000)
    assert list(again) == asks


SHAREGPT = [
    {"id": "x", "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because of it"}]},
    {"id": "only a question", "conversations": [{"from": "human", "value": "hm"}]},
    {"id": "begins with an answer", "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": "nothing"},
            {"role": "user", "content": "thanks"},
        ]
    },
]


def test_conversations(tmp_path: Path) -> None:
    expected = (Turn("why?", None, None, 13), Turn("and then?", None, None, 7))
    (tmp_path / "whole.json").write_text(json.dumps(SHAREGPT))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, SHAREGPT)))
    assert read_trace(tmp_path / "whole.json") == expected
    assert read_trace(tmp_path / "lines.jsonl") == expected
    of = workload(trace=expected, characters_per_token=2.0)
    asks = some(of, count=3)
    assert [(ask.prompt, ask.prompt_tokens, ask.output_tokens) for ask in asks] == [
        ("why?", 2, 6),
        ("and then?", 4, 4),
        ("why?", 2, 6),
    ]
    assert of.has_texts


def test_lengths_and_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        {"arrival_s": 0, "prompt_tokens": 7, "output_tokens": 3},
        {"arrival_s": 1.5, "prompt_tokens": 4, "output_tokens": 2},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    of = workload(trace=read_trace(file))
    assert of.has_times
    assert not of.has_texts
    assert [(len(ask.prompt), ask.output_tokens, ask.at) for ask in some(of, count=2)] == [(7, 3, 0.0), (4, 2, 1.5)]
    file.write_text(json.dumps({"prompt": "say", "output_tokens": 9, "output": "hm"}))
    (ask,) = some(workload(trace=read_trace(file)), count=1)
    assert (ask.prompt, ask.output_tokens, ask.at) == ("say", 9, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no exchange"),
        ("[]", "holds no exchange"),
        ("[{]", "is not JSON"),
        ('{"prompt": "a", "output_tokens": 1}\n{', "line 2: is not JSON"),
        ("3", "line 1: must be an object"),
        ('{"prompt": "a"}', "has prompt; needs conversations, or prompt"),
        ('{"prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens = 0: must be a whole number"),
        ('{"prompt": "", "output_tokens": 1}', "prompt must be a text"),
        ('{"prompt": "a", "output_tokens": 1, "arrival_s": -1}', "arrival_s = -1"),
        ('{"conversations": [3, 4]}', "turns must have from and value"),
        ('{"conversations": 3}', "turns must have from and value"),
        (
            '{"prompt": "a", "output_tokens": 1, "arrival_s": 2}\n{"prompt": "a", "output_tokens": 1, "arrival_s": 1}',
            "in order",
        ),
        ('{"prompt": "a", "output_tokens": 1, "arrival_s": 2}\n{"prompt": "a", "output_tokens": 1}', "in every line"),
    ],
)
def test_traces_that_are_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_trace(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "nowhere")


def test_levels_have_names() -> None:
    assert [str(Level("concurrency", 1)), str(Level("concurrency", 8)), str(Level("rate", 2.5))] == [
        "1 stream",
        "8 streams",
        "2.5 requests/s",
    ]
