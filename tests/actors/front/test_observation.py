"""Models, keys, body limits and request ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moray.actors.front.served_model import SamplingDefaults, ServedModel
from moray.actors.front.settings import FrontSettings, load_api_keys
from moray.actors.front.testing import write_toy_tokenizer
from moray.configs.errors import CheckpointError, ConfigError

# --- models


def test_the_model_is_listed(make_front: Any) -> None:
    front = make_front()
    listing = front.request("GET", "/v1/models").json()
    card = {"id": "toy-r1", "object": "model", "created": 1_700_000_000, "owned_by": "moray", "max_model_len": 400}
    assert listing == {"object": "list", "data": [card]}
    assert front.request("GET", "/v1/models/toy-r1").json() == card


def test_a_name_with_a_slash_can_be_looked_up(make_front: Any, model: Any) -> None:
    front = make_front(model=replace(model, name="deepseek-ai/DeepSeek-R1"))
    assert front.request("GET", "/v1/models/deepseek-ai/DeepSeek-R1").json()["id"] == "deepseek-ai/DeepSeek-R1"


# --- keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "keys"
    path.write_text("# operators\nsk-one\n\n  sk-two  \n")
    return load_api_keys(path)


def test_keys_are_one_a_line(keys: tuple[str, ...]) -> None:
    assert keys == ("sk-one", "sk-two")
    assert "sk-one" not in repr(FrontSettings(api_keys=keys))


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-three",
        "Basic sk-one",
        "sk-one",
        "Bearer sk-one sk-two",
        "Bearer sk-onE",
    ],
)
def test_without_a_known_key_everything_but_health_is_closed(
    make_front: Any, keys: tuple[str, ...], authorization: str | None
) -> None:
    front = make_front(settings=FrontSettings(api_keys=keys))
    headers = {} if authorization is None else {"authorization": authorization}
    for method, path in [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/moray/status"),
        ("GET", "/metrics"),
        ("GET", "/nowhere"),
    ]:
        response = front.request(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert front.request("GET", "/health", headers=headers).status_code == 200


def test_every_key_opens(make_front: Any, keys: tuple[str, ...]) -> None:
    front = make_front(settings=FrontSettings(api_keys=keys))
    for authorization in ("Bearer sk-one", "bearer sk-two", "Bearer  sk-two"):
        assert front.request("GET", "/v1/models", headers={"authorization": authorization}).status_code == 200


def test_a_wrong_key_costs_no_reading(make_front: Any, keys: tuple[str, ...]) -> None:
    front = make_front(settings=FrontSettings(api_keys=keys, body_limit_bytes=10))
    assert front.chat("x" * 1000).status_code == 401


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"\n# none\n", "has no key"), (b"a b", "line 1"), (b"k\xc3\xa9", "line 1")],
)
def test_key_files_that_would_let_nobody_or_everybody_in(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_api_keys(path)


# --- body limit


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(make_front: Any, chunked: bool) -> None:
    front = make_front(settings=FrontSettings(body_limit_bytes=1000))

    async def pieces() -> Any:
        for _ in range(11):
            yield b" " * 100

    body = pieces() if chunked else b" " * 1100
    response = front.request("POST", "/v1/completions", content=body)
    assert response.status_code == 413
    error = response.json()["error"]
    assert error["code"] == "request_too_large"
    assert "1000 bytes" in error["message"]
    assert front.complete("x").status_code == 200


def test_a_body_at_the_limit_is_taken(make_front: Any) -> None:
    body = b'{"model": "toy-r1", "prompt": "x"}'
    front = make_front(settings=FrontSettings(body_limit_bytes=len(body)))
    assert front.request("POST", "/v1/completions", content=body).status_code == 200
    assert front.request("POST", "/v1/completions", content=body + b" ").status_code == 413


# --- request ids


def test_every_answer_has_a_request_id(make_front: Any) -> None:
    front = make_front()
    seen = {front.request("GET", path).headers["x-request-id"] for path in ("/health", "/nowhere", "/v1/models")}
    seen.add(front.chat(stream=True).headers["x-request-id"])
    assert len(seen) == 4


def test_a_plain_request_id_is_kept_and_a_strange_one_is_not(make_front: Any) -> None:
    front = make_front()
    assert front.request("GET", "/health", headers={"x-request-id": "a-1.b"}).headers["x-request-id"] == "a-1.b"
    assert front.request("GET", "/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")
    silent = make_front(settings=FrontSettings(sends_request_id=False))
    assert "x-request-id" not in silent.request("GET", "/health").headers


# --- settings and model files


@pytest.mark.parametrize(
    "name", ["body_limit_bytes", "stall_timeout_s", "keepalive_s", "send_timeout_s", "completion_max_tokens"]
)
def test_settings_out_of_range(name: str) -> None:
    setting: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        FrontSettings(**setting)


CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 2048,
    "eos_token_id": 1,
}


def write_model(directory: Path, generation: str | None, **config: Any) -> Path:
    write_toy_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if generation is not None:
        (directory / "generation_config.json").write_text(generation)
    return directory


def test_a_model_is_read_from_its_directory(tmp_path: Path) -> None:
    path = write_model(tmp_path, '{"temperature": 0.6, "top_p": 0.95, "do_sample": true, "eos_token_id": [1, 2]}')
    model = ServedModel.load(path, name="m", max_context=100)
    assert (model.max_context, model.vocab_size, model.eos_token_ids) == (100, 512, (1, 2))
    assert model.defaults == SamplingDefaults(temperature=0.6, top_p=0.95)
    assert ServedModel.load(path, name="m").max_context == 2048


@pytest.mark.parametrize(
    ("generation", "defaults"),
    [
        (None, SamplingDefaults()),
        ("{}", SamplingDefaults()),
        ('{"do_sample": false}', SamplingDefaults(temperature=0.0)),
    ],
)
def test_without_defaults_openais_hold(tmp_path: Path, generation: str | None, defaults: SamplingDefaults) -> None:
    assert ServedModel.load(write_model(tmp_path, generation), name="m").defaults == defaults


@pytest.mark.parametrize("generation", ["[]", "{", '{"temperature": "hot"}', '{"top_p": 7}', '{"eos_token_id": 9999}'])
def test_a_damaged_generation_config_is_refused_by_name(tmp_path: Path, generation: str) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        ServedModel.load(write_model(tmp_path, generation), name="m")


def test_files_of_different_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="different checkpoints"):
        ServedModel.load(write_model(tmp_path, None, vocab_size=100), name="m")
    with pytest.raises(ConfigError, match="2048"):
        ServedModel.load(write_model(tmp_path, None), name="m", max_context=4096)
