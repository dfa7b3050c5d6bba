"""Deployment files and flags: what is refused says which setting, which value, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moray.cluster import assembly
from moray.cluster.assembly import checkpoint_path, compute, drafts, host_compute, max_context, router_settings
from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.testing import SMALL_CONFIG

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = ModelConfig.from_dict(dict(SMALL_CONFIG))  # made for 2048 tokens


def test_defaults_describe_the_embedded_model() -> None:
    deployment = Deployment.from_dict({})
    assert (deployment.model, deployment.served_name, deployment.experts.hosts) == ("tiny-r1", "tiny-r1", 2)
    assert checkpoint_path(deployment.model).joinpath("config.json").is_file()


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        ({"modle": "x"}, ["modle: no such setting"]),
        ({"experts": {"host": 3}}, ["experts.host: no such setting"]),
        ({"experts": {"hosts": 0}}, ["experts.hosts = 0", "greater than or equal to 1"]),
        ({"experts": {"hosts": "2"}}, ["experts.hosts = '2'", "valid integer"]),
        ({"experts": {"reply_timeout_s": 0}}, ["experts.reply_timeout_s = 0"]),
        ({"experts": []}, ["experts = []"]),
        ({"routers": {"page_size": True}}, ["routers.page_size = True"]),
        ({"routers": {"token_budget": 8}}, ["token_budget = 8 is below max_running = 64", "raise the first"]),
        (
            {"autoscale": {"experts": {"min_hosts": 5, "max_hosts": 4}}},
            ["autoscale.experts: min_hosts = 5 must be at most max_hosts = 4"],
        ),
        (
            {"autoscale": {"experts": {"low_utilisation": 0.8}}},
            ["autoscale.experts: low_utilisation = 0.8 must be below high_utilisation = 0.8"],
        ),
        ({"autoscale": {"experts": {"high_utilisation": 80}}}, ["high_utilisation = 80", "less than or equal to 1"]),
        (
            {"autoscale": {"routers": {"min_routers": 5}}},
            ["autoscale.routers: min_routers = 5 must be at most max_routers = 4"],
        ),
        (
            {"autoscale": {"routers": {"low_kv_use": 0.95}}},
            ["autoscale.routers: low_kv_use = 0.95 must be below high_kv_use = 0.9"],
        ),
        ({"autoscale": {"routers": {"cooldown_s": -1}}}, ["autoscale.routers.cooldown_s = -1"]),
        (
            {"experts": {"min_replicas": 2}, "autoscale": {"experts": {"enabled": True, "max_hosts": 1}}},
            ["my.yaml: autoscale.experts.max_hosts = 1 is below experts.min_replicas = 2", "distinct hosts"],
        ),
        ({"supervision": {"stuck_after_s": 20}}, ["supervision: ", "stuck_after_s = 20", "longer than the one before"]),
        ({"experts": {"resources": {"GPU": 1}}}, ["experts.resources: 'GPU' is no resource label: use the key gpus"]),
        ({"routers": {"resources": {"CPU": 1}}}, ["routers.resources: 'CPU' is no resource label: use the key cpus"]),
        (
            {"experts": {"cold": {"resources": {"memory": 1}}}},
            ["experts.cold.resources: 'memory' is no resource label"],
        ),
        ({"routers": {"resources": {"": 1}}}, ["'' is no resource label: it must have a name"]),
        ({"routers": {"resources": {"moray_router": 0}}}, ["moray_router = 0: must be a number of at least 0.0001"]),
        ({"routers": {"resources": {"moray_router": float("inf")}}}, ["moray_router = inf: must be a number"]),
        ({"routers": {"resources": {"moray_router": "1"}}}, ["routers.resources.moray_router = '1'"]),
        ({"experts": {"cold": {"hosts": -1}}}, ["experts.cold.hosts = -1"]),
        ({"experts": {"cold": {"slots": 0}}}, ["experts.cold.slots = 0"]),
        (
            {"link": "nccl", "experts": {"cold": {"hosts": 1}}},
            ["link = 'nccl'", "cold hosts have no GPU; use link: auto"],
        ),
        ({"cpu_instructions": "sse"}, ["cpu_instructions = 'sse'", "avx512_bf16"]),
        ({"dtype": "float16"}, ["dtype = 'float16'", "bfloat16"]),
        ({"link": "ethernet"}, ["link = 'ethernet'", "gloo"]),
        ({"max_context": 1}, ["max_context = 1"]),
        ({"front": {"port": 70000}}, ["front.port = 70000"]),
        ({"front": {"port": -1}, "name": 5}, ["front.port = -1", "name = 5"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refusals_name_key_and_value(raw: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        Deployment.from_dict(raw, source="my.yaml")
    assert str(refusal.value).startswith("my.yaml: ")
    for message in messages:
        assert message in str(refusal.value)


def test_nothing_scales_by_itself_unless_it_is_enabled() -> None:
    autoscale = Deployment.from_dict({}).autoscale
    assert (autoscale.experts.enabled, autoscale.routers.enabled) == (False, False)
    # What is not enabled may be inconsistent with the rest.
    Deployment.from_dict({"experts": {"min_replicas": 2}, "autoscale": {"experts": {"max_hosts": 1}}})


def test_a_cold_host_counts_among_those_that_copies_are_on() -> None:
    scaling = {"experts": {"enabled": True, "max_hosts": 1}}
    Deployment.from_dict({"experts": {"min_replicas": 2, "cold": {"hosts": 1}}, "autoscale": scaling})


def test_resources_as_plain_data_and_back() -> None:
    deployment = Deployment.from_dict(
        {"experts": {"resources": {"moray_expert": 1, "rack": 0.5}, "cold": {"hosts": 2}}}
    )
    assert deployment.experts.resources == {"moray_expert": 1.0, "rack": 0.5}
    assert Deployment.from_dict(deployment.model_dump()) == deployment


def test_whole_numbers_do_for_times() -> None:
    assert Deployment.from_dict({"experts": {"reply_timeout_s": 3}}).experts.reply_timeout_s == 3.0


def test_a_deployment_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Deployment.from_dict({}).model = "other"


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "serve-file"])
def test_files(tmp_path: Path, wrapped: bool) -> None:
    raw: dict[str, Any] = {"model": "tiny-r1", "experts": {"hosts": 4}, "front": {"api_key_file": "~/keys"}}
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"name": "moray", "args": raw}]} if wrapped else raw))
    assert Deployment.load(path) == Deployment.from_dict(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read as YAML"),
        ("- 1", "must hold a deployment"),
        ("", "must hold a deployment"),
        ("applications: []", "must hold a deployment"),
        ("applications: [{name: x}]", "must hold a deployment"),
        ("applications: [{args: {hosts: 1}}]", "hosts: no such setting"),
        ("experts: {hosts: many}", "experts.hosts = 'many'"),
    ],
)
def test_file_refusals_name_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "deployment.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        Deployment.load(path)
    assert str(path) in str(refusal.value)
    assert message in str(refusal.value)


def test_the_files_that_ship_can_be_loaded() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "deployments"
    for path in folder.glob("*.yaml"):
        Deployment.load(path)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"model": "/models/DeepSeek-R1"}, "DeepSeek-R1"),
        ({"model": "/models/DeepSeek-R1/"}, "DeepSeek-R1"),
        ({"model": "models/small"}, "small"),
        ({"model": "/models/x", "name": "deepseek-r1"}, "deepseek-r1"),
    ],
)
def test_served_name(raw: dict[str, Any], name: str) -> None:
    assert Deployment.from_dict(raw).served_name == name


def test_served_name_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Deployment.from_dict({"model": "."}).served_name == tmp_path.name


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="model = '/no/such/model': no such directory"):
        checkpoint_path("/no/such/model")


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ({}, 2048),
        ({"routers": {"cache_tokens": 1000}}, 1000),
        ({"max_context": 500}, 500),
        ({"max_context": 2048}, 2048),
    ],
)
def test_max_context(raw: dict[str, Any], tokens: int) -> None:
    assert max_context(Deployment.from_dict(raw), CONFIG) == tokens


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"max_context": 2049}, "max_context = 2049: the model was made for 2048"),
        ({"max_context": 1000, "routers": {"cache_tokens": 999}}, "routers.cache_tokens = 999"),
    ],
)
def test_max_context_refusals(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        max_context(Deployment.from_dict(raw), CONFIG)
    assert message in str(refusal.value)


@pytest.mark.parametrize(("page", "cache", "pages"), [(32, 32768, 1024), (32, 33, 2), (7, 100, 15), (1000, 5, 1)])
def test_the_pool_holds_the_longest_sequence(page: int, cache: int, pages: int) -> None:
    raw = {"routers": {"page_size": page, "cache_tokens": cache}}
    settings = router_settings(Deployment.from_dict(raw), CONFIG)
    assert settings.pages == pages
    assert settings.pages * page >= settings.max_context


@pytest.mark.parametrize(
    ("routers", "shared"), [({}, True), ({"cpus": 4}, False), ({"threads": 2}, False), ({"replicas": 2}, True)]
)
def test_whose_cores_a_router_computes_on(routers: dict[str, Any], shared: bool) -> None:
    settings = router_settings(Deployment.from_dict({"routers": routers}), CONFIG)
    assert settings.shares_cores == shared, "with those of hosts, unless it is given some of its own"


@pytest.mark.parametrize(
    ("raw", "gpus", "expected"),
    [
        ({}, 0, "auto"),
        ({}, 2, "off"),
        ({"device": "cpu"}, 2, "auto"),
        ({"device": "cuda", "routers": {"speculate": "on"}}, 1, "on"),
        ({"routers": {"speculate": "off"}}, 0, "off"),
    ],
)
def test_which_deployments_serve_the_mtp_layer(raw: dict[str, Any], gpus: int, expected: str) -> None:
    assert drafts(Deployment.from_dict(raw), gpus=gpus) == expected


def test_how_much_is_drafted() -> None:
    three = Deployment.from_dict({"routers": {"speculate": "on", "draft_tokens": 3}})
    with_layer = replace(CONFIG, num_nextn_predict_layers=1).with_draft_layer()
    settings = router_settings(three, with_layer)
    assert (settings.draft_tokens, settings.draft_always) == (3, True)
    assert router_settings(three, CONFIG).draft_tokens == 0
    settings = router_settings(Deployment(), with_layer)
    assert (settings.draft_tokens, settings.draft_always) == (1, False)


@pytest.mark.parametrize(
    ("raw", "gpus", "expected"),
    [
        ({}, 0, Compute.native()),
        ({"dtype": "float32"}, 0, Compute(CPU, torch.float32)),
        ({"dtype": "bfloat16"}, 0, Compute.native()),
        ({"fp8": "decode"}, 0, Compute(CPU, torch.bfloat16, packed=True)),
        ({"fp8": "keep", "routers": {"kv_cache": "fp8"}}, 0, Compute(CPU, torch.float32, keep_fp8=True, fp8_kv=True)),
        ({}, 2, Compute(CUDA, torch.bfloat16, keep_fp8=True)),
        ({"device": "cuda", "dtype": "float32", "fp8": "decode"}, 1, Compute(CUDA, torch.float32)),
        ({"device": "cpu"}, 8, Compute.native()),
    ],
)
def test_what_is_computed_with(raw: dict[str, Any], gpus: int, expected: Compute) -> None:
    assert compute(Deployment.from_dict(raw), gpus=gpus) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, Compute(CPU, torch.float32)),
        ({"dtype": "bfloat16"}, Compute(CPU, torch.bfloat16)),
        ({"fp8": "keep"}, Compute(CPU, torch.float32, keep_fp8=True)),
    ],
)
def test_what_is_computed_with_where_no_kernels_are(
    raw: dict[str, Any], expected: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "native", lambda: None)
    assert compute(Deployment.from_dict(raw), gpus=0) == expected


@pytest.mark.parametrize(
    ("raw", "gpus", "expected"),
    [
        ({"cpu_instructions": "avx2"}, 0, replace(Compute.native(), instructions="avx2")),
        ({"cpu_instructions": "generic"}, 0, replace(Compute.native(), instructions="generic")),
        ({"cpu_instructions": "avx2"}, 1, Compute(CUDA, torch.bfloat16, keep_fp8=True)),
    ],
)
def test_instructions_of_cpus(
    raw: dict[str, Any], gpus: int, expected: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this machine has: it may be the controller's, where nothing is computed."""
    monkeypatch.setattr(assembly, "native", lambda: None)
    deployment = Deployment.from_dict(raw)
    assert compute(deployment, gpus=gpus) == expected
    assert host_compute(deployment, "cold-host-0", gpus=gpus).instructions == raw["cpu_instructions"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [({"dtype": "float32"}, "dtype = 'float32'"), ({"routers": {"kv_cache": "fp8"}}, "routers.kv_cache = 'fp8'")],
)
def test_instructions_that_torch_would_not_heed(raw: dict[str, Any], reason: str) -> None:
    deployment = Deployment.from_dict(raw | {"cpu_instructions": "avx2"})
    with pytest.raises(ConfigError, match=f"cpu_instructions = 'avx2' and {reason}: .* leave one out"):
        compute(deployment, gpus=0)


def test_cold_hosts_may_compute_by_torch_all_the_same() -> None:
    raw = {"cpu_instructions": "avx2", "experts": {"cold": {"hosts": 1, "dtype": "float32"}}}
    assert host_compute(Deployment.from_dict(raw), "cold-host-0", gpus=0) == Compute(CPU, torch.float32, keep_fp8=True)


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device = 'cuda': there is no GPU here; use cpu or auto"):
        compute(Deployment.from_dict({"device": "cuda"}), gpus=0)
