"""A plan's parameters and bytes: against what was published of DeepSeek-R1, and against tensors that are really loaded."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.actors.expert_host import ExpertHost
from moray.cluster.assembly import checkpoint_path
from moray.cluster.assembly import compute as compute_of
from moray.cluster.local import LLM
from moray.cluster.planning.footprint import KV_PAGES, SCALES, WEIGHTS
from moray.cluster.planning.nodes import parse_nodes
from moray.cluster.planning.plan import make_plan
from moray.cluster.planning.sizes import ModelSizes
from moray.configs.deployment import Deployment
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.loading import load_dense, open_model
from moray.model.tensor_names import TensorNames
from moray.model.testing import write_random_checkpoint
from moray.model.weights import router_weights

from .plan_models import R1_CONFIG

ON_GPU = Compute(torch.device("cuda"), torch.bfloat16, keep_fp8=True)
CPU = torch.device("cpu")


def real_bytes(weights: object) -> int:
    """Of every tensor in it; each memory counts once."""
    found: dict[int, int] = {}

    def visit(part: object) -> None:
        if isinstance(part, torch.Tensor):
            found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, tuple | list):
            for entry in part:
                visit(entry)
        elif is_dataclass(part):
            for field in fields(part):
                visit(getattr(part, field.name))

    visit(weights)
    return sum(found.values())


def test_r1_has_the_published_parameters() -> None:
    """The release counts 671B without the MTP module, 36.6B active with the head but without the embedding, 685B in files."""
    parameters = ModelSizes(R1_CONFIG, ON_GPU).parameters
    assert parameters.main == pytest.approx(671e9, rel=1e-3)
    assert parameters.active == pytest.approx(36.6e9, rel=1e-3)
    assert round(parameters.active / 1e9) == 37
    assert parameters.active_with_embedding - parameters.active == 129280 * 7168
    assert round((parameters.main + parameters.mtp) / 1e9) == 684


def test_r1_has_the_published_bytes() -> None:
    """163 files of 688,586,727,753 bytes, headers included: 100 kB each or less."""
    sizes = ModelSizes(R1_CONFIG, ON_GPU)
    assert sizes.disk_total.total == pytest.approx(689e9, rel=1e-2)
    assert 0 < 688_586_727_753 - sizes.disk_total.total < 163 * 100_000
    assert sizes.disk_expert.total == sizes.expert.total == 44_050_944
    assert sizes.kv_token_bytes == 70_272


def test_r1_kv_pages_in_fp8() -> None:
    compute = Compute(torch.device("cuda"), torch.bfloat16, keep_fp8=True, fp8_kv=True)
    assert ModelSizes(R1_CONFIG, compute).kv_token_bytes == 61 * 656


def test_tiny_r1_on_disk_is_its_file() -> None:
    path = checkpoint_path("tiny-r1")
    file = path / "model.safetensors"
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    sizes = ModelSizes(ModelConfig.load(path), Compute.on_cpu())
    assert sizes.disk_total.total == file.stat().st_size - 8 - header


@pytest.mark.parametrize(("speculate", "layers"), [("off", 4), ("auto", 5)])
def test_tiny_r1_occupies_what_the_plan_says(speculate: str, layers: int) -> None:
    """The plan of one CPU node, and the same model loaded in this process: not 5% apart but equal."""
    config = ModelConfig.load(checkpoint_path("tiny-r1"))
    routers = {"cache_tokens": 4096, "speculate": speculate}
    plan = make_plan(
        "tiny-r1",
        config,
        parse_nodes("1xcpu:16"),
        Deployment.from_dict({"routers": routers}),
        hosts=3,
        context=2048,
        cache_tokens=4096,
    )
    assert plan.fits, plan.problems
    assert len(plan.config.moe_layers) == layers
    with LLM("tiny-r1", experts=3, routers=routers) as llm:
        read = {p.id: p.data_bytes_read for p in llm.cluster.status().processes}
        assert read.pop("router-0") == plan.sizes.disk_dense.total
        assert sum(read.values()) == 16 * layers * plan.sizes.disk_expert.total
        model = llm.cluster.router.model
        for host in llm.cluster.hosts:
            memory = plan.layout.process(host.host_id).memory
            assert memory[WEIGHTS] + memory[SCALES] == host.report().resident_bytes
        memory = plan.layout.process("router-0").memory
        _, checkpoint = open_model(checkpoint_path("tiny-r1"), verify="headers")
        weights = router_weights(plan.config, load_dense(checkpoint, plan.config)[0], compute_of(Deployment(), gpus=0))
        assert memory[WEIGHTS] + memory[SCALES] == real_bytes(weights) + model.rotation.nbytes
        assert memory[KV_PAGES] == model.cache.nbytes
        assert plan.layout.table is not None
        assert plan.layout.table.slots == llm.cluster.table.slots


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep_fp8", [True, False])
@pytest.mark.parametrize(
    ("stored", "overrides"),
    [
        ("fp8", {}),
        ("bfloat16", {}),
        ("fp8", {"tie_word_embeddings": True}),
        ("fp8", {"q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy", "scoring_func": "softmax"}),
        ("fp8", {"first_k_dense_replace": 0}),
    ],
)
def test_any_model_occupies_what_the_plan_says(
    stored: Any, overrides: dict[str, Any], keep_fp8: bool, packed: bool, tmp_path: Path
) -> None:
    """Matrices of ragged blocks, tied heads, direct queries: in each form that a process may hold them."""
    path = write_random_checkpoint(tmp_path / "model", overrides, dtype=stored)
    config, checkpoint = open_model(path, verify="headers")
    compute = Compute(CPU, torch.bfloat16, keep_fp8=keep_fp8, packed=packed)
    sizes = ModelSizes(config, compute)
    assert sizes.router.total.total == real_bytes(router_weights(config, load_dense(checkpoint, config)[0], compute))
    host = ExpertHost("expert-host-0", compute=compute)
    host.load(path, [[0, 3] for _ in config.moe_layers], epoch=1)
    assert host.report().resident_bytes == 2 * len(config.moe_layers) * sizes.expert.total
    names = TensorNames(config)
    expected = [*names.dense(), *names.routed_experts()]
    assert sizes.parameters.main == sum(math.prod(tensor.shape) for tensor in expected)
    files = sum(entry.nbytes for entry in checkpoint.tensors.values())
    assert sizes.disk_total.total == files


def test_without_an_fp8_section_everything_is_plain() -> None:
    raw = json.loads(checkpoint_path("tiny-r1").joinpath("config.json").read_text())
    del raw["quantization_config"]
    sizes = ModelSizes(ModelConfig.from_dict(raw), ON_GPU)
    assert sizes.disk_total.scales == sizes.expert.scales == sizes.router.total.scales == 0
