"""Health, metrics, status, models, keys, body limits and request ids."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moray.actors.front.served_model import SamplingDefaults, ServedModel
from moray.actors.front.settings import FrontSettings, load_api_keys
from moray.actors.front.testing import write_toy_tokenizer
from moray.actors.messages import ClusterStatus, ProcessStatus, RouterStats
from moray.configs.errors import CheckpointError, ConfigError, QueueFullError

OK = ClusterStatus(
    model="toy-r1",
    epoch=7,
    health="ok",
    reason="",
    processes=[
        ProcessStatus("expert-host-0", "expert_host", 11, "n0", "ready"),
        ProcessStatus("expert-host-1", "expert_host", 12, "n0", "dead", "killed"),
        ProcessStatus("router-0", "router", 13, "n0", "ready"),
    ],
    routers=[RouterStats("router-0", running=2, waiting=1, pages_total=10, pages_free=4, steps=99, generated_tokens=5)],
)


def samples(text: str) -> dict[str, float]:
    """Every sample as `name{label="value",...}` without the front's own label and creation times."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "front")
            if not sample.name.endswith("_created"):
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


# --- health


@pytest.mark.parametrize(
    ("state", "code", "health"),
    [
        (OK, 200, "ok"),
        (replace(OK, health="degraded", reason="spare replicas are missing"), 200, "degraded"),
        (replace(OK, health="starting"), 503, "starting"),
        (replace(OK, health="unavailable", reason="layer 3"), 503, "unavailable"),
        (replace(OK, routers=[RouterStats("router-0", unreachable_experts=4)]), 503, "unavailable"),
        (RuntimeError("no controller"), 503, "unavailable"),
    ],
)
def test_health_is_fine_only_while_every_expert_is_reachable(
    make_front: Any, state: Any, code: int, health: str
) -> None:
    front = make_front()
    front.engine.state = state
    response = front.request("GET", "/health")
    assert response.status_code == code
    assert response.json()["health"] == health
    assert set(response.json()) == {"health", "reason"}
    assert front.request("HEAD", "/health").status_code == code


def test_a_cluster_that_does_not_answer_is_not_healthy(make_front: Any) -> None:
    front = make_front(settings=FrontSettings(status_timeout_s=0.05))

    async def never() -> ClusterStatus:
        await asyncio.Event().wait()
        raise AssertionError

    front.engine.status = never
    assert front.request("GET", "/health").status_code == 503
    assert front.request("GET", "/v1/moray/status").status_code == 503
    assert samples(front.request("GET", "/metrics").text)["moray_cluster_healthy{}"] == 0


# --- models and status


def test_the_model_is_listed(make_front: Any) -> None:
    front = make_front()
    listing = front.request("GET", "/v1/models").json()
    card = {"id": "toy-r1", "object": "model", "created": 1_700_000_000, "owned_by": "moray", "max_model_len": 400}
    assert listing == {"object": "list", "data": [card]}
    assert front.request("GET", "/v1/models/toy-r1").json() == card


def test_a_name_with_a_slash_can_be_looked_up(make_front: Any, model: Any) -> None:
    front = make_front(model=replace(model, name="deepseek-ai/DeepSeek-R1"))
    assert front.request("GET", "/v1/models/deepseek-ai/DeepSeek-R1").json()["id"] == "deepseek-ai/DeepSeek-R1"


def test_the_clusters_status_is_shown(make_front: Any) -> None:
    front = make_front()
    front.engine.state = OK
    body = front.request("GET", "/v1/moray/status").json()
    assert (body["epoch"], body["health"]) == (7, "ok")
    assert body["processes"][1]["detail"] == "killed"
    assert body["routers"][0]["pages_free"] == 4


# --- metrics


def test_metrics_count_what_happened(make_front: Any) -> None:
    front = make_front("ab", settings=FrontSettings(front_id="f7"))
    front.engine.state = OK
    front.chat()
    front.complete(max_tokens=1)
    front.chat(temperature=9)
    front.request("GET", "/nowhere/1")
    front.request("GET", "/nowhere/2")
    response = front.request("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'front="f7"' in response.text
    found = samples(response.text)
    assert found["moray_http_requests_total{endpoint=/v1/chat/completions,status=200}"] == 1
    assert found["moray_http_requests_total{endpoint=/v1/chat/completions,status=400}"] == 1
    assert found["moray_http_requests_total{endpoint=other,status=404}"] == 2
    assert found["moray_http_requests_in_flight{endpoint=/v1/chat/completions}"] == 0
    assert found["moray_http_requests_in_flight{endpoint=/metrics}"] == 1
    assert found["moray_generations_total{reason=stop}"] == 1
    assert found["moray_generations_total{reason=length}"] == 1
    assert found["moray_completion_tokens_total{}"] == 3 + 1
    assert found["moray_requests_resubmitted_total{}"] == 0
    assert found["moray_prompt_tokens_total{}"] == sum(len(r.prompt_token_ids) for r in front.engine.requests)
    assert found["moray_time_to_first_token_seconds_count{}"] == 2
    assert found["moray_inter_token_latency_seconds_count{}"] == 2
    assert found["moray_cluster_healthy{}"] == 1
    assert found["moray_cluster_health{health=ok}"] == 1
    assert found["moray_placement_epoch{}"] == 7
    assert found["moray_processes{role=expert_host,state=dead}"] == 1
    assert found["moray_router_running{router=router-0}"] == 2
    assert found["moray_router_pages_free{router=router-0}"] == 4
    assert found["moray_router_generated_tokens_total{router=router-0}"] == 5


def test_metrics_count_requests_that_moved_to_another_router(make_front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front = make_front()
    for moved in (0, 3, 3, 4):
        monkeypatch.setattr(type(front.engine), "resubmitted", moved)
        found = samples(front.request("GET", "/metrics").text)
        assert found["moray_requests_resubmitted_total{}"] == moved


def test_failures_are_counted_by_how_they_ended(make_front: Any) -> None:
    front = make_front([QueueFullError("full", retry_after_s=1)])
    front.chat()
    found = samples(front.request("GET", "/metrics").text)
    assert found["moray_generations_total{reason=error}"] == 1
    assert found["moray_http_requests_total{endpoint=/v1/chat/completions,status=429}"] == 1


def test_apps_do_not_share_metrics(make_front: Any) -> None:
    first, second = make_front(), make_front()
    first.chat()
    assert samples(first.request("GET", "/metrics").text)["moray_completion_tokens_total{}"] > 0
    assert samples(second.request("GET", "/metrics").text)["moray_completion_tokens_total{}"] == 0


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
