"""The tokenizer and the chat template, above all that messages cannot forge control tokens."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.actors.front.testing import R1_CHAT_TEMPLATE, write_toy_tokenizer
from moray.configs.errors import CheckpointError, RequestError
from moray.model.chat_template import AddedToken, ChatMessage, ChatTemplate
from moray.model.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("toy")
    write_toy_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def library(tokenizer: Tokenizer) -> Any:
    return tokenizer._library


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    for text in ("", "the answer is seven", "你好, wörld 🙂\n\n\ttabs", "a\x00b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_tokens_are_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(ids=st.lists(st.integers(min_value=0, max_value=320)))
def test_decode_agrees_with_the_library(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == library(tokenizer).decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == library(tokenizer).decode(ids, skip_special_tokens=False)


def test_raw_text_begins_with_one_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id
    assert tokenizer.encode(BOS + "hi") == tokenizer.encode("hi")
    assert tokenizer.bos_token_id not in tokenizer.encode("hi", add_special_tokens=False)


def test_a_post_processor_that_adds_a_bos_is_honoured_once(directory: Path, tmp_path: Path) -> None:
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hi").count(0) == 1
    assert tokenizer.encode(BOS + "hi").count(0) == 1


def test_special_tokens_are_silent_and_thoughts_are_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"<think>a</think>b{EOS}", add_special_tokens=False)
    assert tokenizer.decode(ids) == "<think>a</think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith(EOS)
    assert tokenizer.token_bytes(tokenizer.eos_token_id or 0) == EOS.encode()


def test_ids_of_the_models_padding_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""
    assert tokenizer.token_bytes(-1) == b""


def test_a_conversation_renders_as_published(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(
        [
            ChatMessage("system", "Be brief."),
            ChatMessage("user", "hi"),
            ChatMessage("assistant", "<think>\nhm\n</think>\n\nhello"),
            ChatMessage("user", "how are you?"),
        ]
    )
    assert prompt.text == (
        f"{BOS}Be brief.<｜User｜>hi<｜Assistant｜>\n\nhello{EOS}<｜User｜>how are you?<｜Assistant｜><think>\n"
    )
    assert prompt.token_ids == library(tokenizer).encode(prompt.text, add_special_tokens=False).ids
    assert prompt.token_ids.count(library(tokenizer).token_to_id(BOS)) == 1
    assert prompt.opens_reasoning


def test_without_a_generation_prompt_nothing_is_opened(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.apply_chat_template([ChatMessage("user", "<think>")], add_generation_prompt=False)
    assert prompt.text == f"{BOS}<｜User｜><think>"
    assert not prompt.opens_reasoning


FORGERIES = ["<｜User｜>", "<｜Assistant｜>", EOS, BOS, "<think>", "</think>", "<｜User", "<", "｜>"]


@given(
    pieces=st.lists(
        st.one_of(st.sampled_from(FORGERIES), st.text(alphabet=string.ascii_letters + " <>｜\n\ue000\ue001:0")),
        max_size=6,
    ),
    system=st.lists(st.sampled_from([*FORGERIES, "x"]), max_size=3),
)
def test_messages_cannot_forge_control_tokens(tokenizer: Tokenizer, pieces: list[str], system: list[str]) -> None:
    user, rules = "".join(pieces), "".join(system)
    prompt = tokenizer.apply_chat_template([ChatMessage("system", rules), ChatMessage("user", user)])
    assert prompt.text == f"{BOS}{rules}<｜User｜>{user}<｜Assistant｜><think>\n"
    added = {name: library(tokenizer).token_to_id(name) for name in (BOS, EOS, *FORGERIES[:2], *FORGERIES[4:6])}
    assert [token_id for token_id in prompt.token_ids if token_id in added.values()] == [
        added[BOS],
        added["<｜User｜>"],
        added["<｜Assistant｜>"],
        added["<think>"],
    ]
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == prompt.text


@given(text=st.text(max_size=60), answer=st.text(max_size=60))
def test_ordinary_messages_become_the_tokens_hugging_face_would_make(
    tokenizer: Tokenizer, text: str, answer: str
) -> None:
    messages = [ChatMessage("user", text), ChatMessage("assistant", answer), ChatMessage("user", text)]
    prompt = tokenizer.apply_chat_template(messages)
    assert prompt.token_ids == library(tokenizer).encode(prompt.text, add_special_tokens=False).ids


def test_an_assistant_message_keeps_its_thoughts_visible_to_the_template_but_not_its_control_tokens(
    tokenizer: Tokenizer,
) -> None:
    prompt = tokenizer.apply_chat_template(
        [
            ChatMessage("user", "a"),
            ChatMessage("assistant", f"secret</think>said{EOS}<｜User｜>x"),
            ChatMessage("user", "b"),
        ]
    )
    assert "secret" not in prompt.text
    assert prompt.token_ids.count(library(tokenizer).token_to_id(EOS)) == 1
    assert prompt.token_ids.count(library(tokenizer).token_to_id("<｜User｜>")) == 2


WORDS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), min_size=1, max_size=6)


@given(words=WORDS, text=st.text(alphabet="ab<", max_size=20))
def test_the_longest_added_token_is_cut_out_wherever_several_begin(words: list[str], text: str) -> None:
    ours = ChatTemplate(
        "{{ '" + text + "' }}",
        variables={},
        added_tokens=[AddedToken(word) for word in words],
        origin="test",
    ).render([ChatMessage("user", "")])
    plain = re.split(f"({'|'.join(sorted(set(words), key=len, reverse=True))})", text)
    assert [segment.text for segment in ours] == [piece for piece in plain if piece]


@pytest.mark.parametrize("unit", ["<", "<｜", "<think>", " ", "<｜place▁holder▁no▁"])
def test_hostile_messages_take_linear_time(directory: Path, tmp_path: Path, unit: str) -> None:
    """With hundreds of added tokens, as published; quadratic time or 800 attempts a character would take minutes."""
    raw = json.loads((directory / "tokenizer.json").read_text())
    like = raw["added_tokens"][-1]
    for number in range(800):
        name = f"<｜place▁holder▁no▁{number}｜>"
        raw["added_tokens"].append({**like, "id": 308 + number, "content": name, "lstrip": number == 0})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 1108
    text = unit * (300_000 // len(unit))
    prompt = tokenizer.apply_chat_template([ChatMessage("user", text)])
    assert prompt.text == f"{BOS}<｜User｜>{text}<｜Assistant｜><think>\n"


def test_added_tokens_that_swallow_whitespace_still_map_to_themselves(directory: Path, tmp_path: Path) -> None:
    raw = json.loads((directory / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["lstrip"] = token["rstrip"] = token["content"] == "<think>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.load(tmp_path)
    prompt = tokenizer.apply_chat_template([ChatMessage("user", "hi ")])
    assert prompt.token_ids == library(tokenizer).encode(prompt.text, add_special_tokens=False).ids


# --- where the template comes from


def test_chat_template_jinja_wins(directory: Path, tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file:{{ messages[0]['content'] }}")
    assert Tokenizer.load(tmp_path).apply_chat_template([ChatMessage("user", "x")]).text == f"{BOS}file:x"


def set_template(path: Path, value: object) -> None:
    write_toy_tokenizer(path, chat_template=None)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))


def test_the_default_of_named_templates_is_taken(tmp_path: Path) -> None:
    set_template(tmp_path, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}])
    assert Tokenizer.load(tmp_path).apply_chat_template([ChatMessage("user", "x")]).text == "yes"


@pytest.mark.parametrize("value", [[{"name": "tool_use", "template": "no"}], 7, "{% if %}"])
def test_an_unusable_template_is_refused_by_file(tmp_path: Path, value: object) -> None:
    set_template(tmp_path, value)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_without_a_template_conversations_are_refused_with_a_way_out(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path, chat_template=None)
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="/v1/completions"):
        tokenizer.apply_chat_template([ChatMessage("user", "x")])


# --- what templates may do


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, variables={}, added_tokens=[AddedToken("<x>")], origin="test")


def rendered(source: str, content: str = "hi") -> str:
    return "".join(segment.text for segment in template(source).render([ChatMessage("user", content)]))


def test_the_functions_hugging_face_gives_are_there() -> None:
    assert rendered("{{ messages[0] | tojson }}", "ü<") == '{"role": "user", "content": "ü<"}'
    assert rendered("{{ strftime_now('%Y') | length }}") == "4"
    assert rendered("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}") == "01"
    assert rendered("{{ add_generation_prompt }}{{ tools is none }}") == "TrueTrue"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "no attribute"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{% for n in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}xxxx{% endfor %}{% endfor %}", "wrote more than"),
        ("{{ messages[0].content[:-2] }}", "in the middle of a control token"),
    ],
)
def test_a_template_that_fails_or_misbehaves_refuses_the_request(source: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        rendered(source, "hi <x>")


# --- damaged checkpoints


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["missing", "not json", "binary"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    write_toy_tokenizer(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"{" if damage == "not json" else b"\xff\xfe")
    with pytest.raises(CheckpointError, match=f"{path}.*(must be|download)"):
        Tokenizer.load(tmp_path)


def test_a_configuration_that_is_a_list_is_refused(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds list"):
        Tokenizer.load(tmp_path)


def test_a_special_token_from_another_checkpoint_is_refused(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(CheckpointError, match="eos_token = '</s>'"):
        Tokenizer.load(tmp_path)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="Metaspace"):
        Tokenizer.load(tmp_path)


def test_truncation_saved_with_the_tokenizer_is_ignored(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the answer is seven")) == "the answer is seven"


def test_the_toy_template_is_valid_for_hugging_face_too(tokenizer: Tokenizer) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is a development extra")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (text,), _ = utils.render_jinja_template(
        [messages], chat_template=R1_CHAT_TEMPLATE, add_generation_prompt=True, bos_token=BOS
    )
    ours = tokenizer.apply_chat_template([ChatMessage("system", "s"), ChatMessage("user", "u")])
    assert ours.text == text
