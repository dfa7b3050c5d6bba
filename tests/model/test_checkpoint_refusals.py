"""What is refused, before anything is started, and whether the message names the file, the tensor and the way out."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moray.configs.errors import CheckpointError
from moray.model import loading, reader
from moray.model.checkpoint import Checkpoint
from moray.model.config import ModelConfig
from moray.model.loading import load_dense, load_experts, open_model
from moray.model.testing import write_random_checkpoint

Tensors = dict[str, torch.Tensor]

GATE_PROJ = "model.layers.1.mlp.experts.3.gate_proj.weight"
SHAPE = (160, 192)


def edit(path: Path, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors of a one-file checkpoint."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def put(tensors: Tensors, name: str, position: tuple[int, ...], value: float) -> None:
    tensors[name][position] = value


def put_code(tensors: Tensors, name: str, position: tuple[int, ...], code: int) -> None:
    tensors[name].view(torch.uint8)[position] = code


def assert_refused(path: Path, *parts: str, verify: loading.Verify = "headers") -> None:
    with pytest.raises(CheckpointError, match=".*".join(re.escape(part) for part in parts)):
        open_model(path, verify=verify)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "plain", dtype="bfloat16")


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "fp8", dtype="fp8")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "sharded", dtype="fp8", shards=3)


class TestTensors:
    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.norm.weight",
            "model.layers.2.self_attn.kv_a_layernorm.weight",
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "model.layers.1.mlp.shared_experts.down_proj.weight",
            GATE_PROJ,
        ],
    )
    def test_missing(self, plain: Path, name: str) -> None:
        edit(plain, lambda tensors: tensors.pop(name))
        assert_refused(plain, str(plain), f"tensor {name}", "is missing", "download")

    def test_missing_though_its_scales_are_there(self, fp8: Path) -> None:
        edit(fp8, lambda tensors: tensors.pop(GATE_PROJ))
        assert_refused(fp8, GATE_PROJ, "is missing though its scales are in model.safetensors")

    def test_wrong_shape(self, plain: Path) -> None:
        file = edit(plain, lambda tensors: tensors.update({GATE_PROJ: tensors[GATE_PROJ][:-1].clone()}))
        assert_refused(plain, str(file), GATE_PROJ, "[159, 192]", "config.json asks for [160, 192]")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e5m2], ids=str)
    def test_wrong_dtype(self, plain: Path, dtype: torch.dtype) -> None:
        file = edit(plain, lambda tensors: tensors.update({GATE_PROJ: torch.zeros(SHAPE).to(dtype)}))
        stored = {torch.int8: "I8", torch.float64: "F64", torch.float8_e5m2: "F8_E5M2"}[dtype]
        assert_refused(plain, str(file), GATE_PROJ, f"stored as {stored}", "F32, BF16, F16, F8_E4M3", "convert")

    def test_fp8_where_only_plain_will_do(self, fp8: Path) -> None:
        name = "model.norm.weight"
        edit(fp8, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
        assert_refused(fp8, name, "stored as F8_E4M3; a norm may be F32, BF16, F16;")

    def test_any_matrix_of_an_fp8_checkpoint_may_be_plain(self, fp8: Path) -> None:
        def unquantize(tensors: Tensors) -> None:
            del tensors[GATE_PROJ + "_scale_inv"]
            tensors[GATE_PROJ] = torch.ones(SHAPE, dtype=torch.bfloat16)

        edit(fp8, unquantize)
        config, checkpoint = open_model(fp8, verify="full")
        experts, _ = load_experts(checkpoint, config, [(1, 3)])
        assert experts[1, 3].gate_proj.scale_inv is None
        assert experts[1, 3].up_proj.scale_inv is not None

    def test_unknown_tensors_are_named_in_one_warning(self, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
        def add(tensors: Tensors) -> None:
            for index in range(7):
                tensors[f"vision.{index}.weight"] = torch.zeros(1)
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
            tensors["model.layers.3.enorm.weight"] = torch.zeros(1)  # the MTP module's

        edit(plain, add)
        with caplog.at_level(logging.WARNING):
            open_model(plain, verify="full")
        (record,) = caplog.records
        assert "7 tensors are not part of the model" in record.getMessage()
        assert record.getMessage().count("vision.") == 5

    def test_a_tied_head_may_be_stored_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = write_random_checkpoint(tmp_path, tied=True)
        edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
        config, checkpoint = open_model(path)
        dense, _ = load_dense(checkpoint, config)
        assert dense.lm_head.weight.data_ptr() == dense.embed_tokens.data_ptr()
        assert not caplog.records


class TestScales:
    def test_missing(self, fp8: Path) -> None:
        file = edit(fp8, lambda tensors: tensors.pop(GATE_PROJ + "_scale_inv"))
        assert_refused(fp8, str(file), GATE_PROJ, f"its scales {GATE_PROJ}_scale_inv are missing", "download")

    def test_of_a_plain_weight(self, fp8: Path) -> None:
        edit(fp8, lambda tensors: tensors.update({GATE_PROJ: torch.zeros(SHAPE, dtype=torch.bfloat16)}))
        assert_refused(fp8, GATE_PROJ + "_scale_inv", "scales a weight stored as BF16", "another checkpoint")

    @pytest.mark.parametrize(
        "scale_inv", [torch.ones(1, 2), torch.ones(2, 1), torch.ones(4), torch.ones(2, 2).bfloat16()]
    )
    def test_wrong_shape_or_dtype(self, fp8: Path, scale_inv: torch.Tensor) -> None:
        edit(fp8, lambda tensors: tensors.update({GATE_PROJ + "_scale_inv": scale_inv}))
        assert_refused(fp8, GATE_PROJ + "_scale_inv", str(list(scale_inv.shape)), "need F32 [2, 2]")

    def test_without_quantization_config(self, fp8: Path) -> None:
        raw = json.loads((fp8 / "config.json").read_text())
        del raw["quantization_config"]
        (fp8 / "config.json").write_text(json.dumps(raw))
        assert_refused(fp8, "F8_E4M3", "config.json has no quantization_config", "use the config.json")


class TestConfig:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("architectures", ["LlamaForCausalLM"]),
            ("quantization_config", {"quant_method": "gptq", "bits": 4}),
            ("quantization_config", {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}),
        ],
    )
    def test_unknown_architecture_or_quantisation(self, plain: Path, key: str, value: Any) -> None:
        raw = json.loads((plain / "config.json").read_text()) | {key: value}
        (plain / "config.json").write_text(json.dumps(raw))
        assert_refused(plain, str(plain / "config.json"), key)


class TestFiles:
    def test_missing_shard(self, sharded: Path) -> None:
        (sharded / "model-00002-of-000003.safetensors").unlink()
        assert_refused(sharded, "1 of 3 files", "model-00002-of-000003.safetensors", "download")

    def test_tensor_not_in_the_shard_the_index_names(self, sharded: Path) -> None:
        shard = sharded / "model-00002-of-000003.safetensors"
        tensors = load_file(shard)
        name = sorted(tensors)[0]
        del tensors[name]
        save_file(tensors, shard)
        assert_refused(sharded, str(shard), name, "is not in it", "download")

    @pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
    def test_truncated(self, sharded: Path, left: int) -> None:
        shard = sharded / "model-00003-of-000003.safetensors"
        size = shard.stat().st_size
        os.truncate(shard, left if left >= 0 else size + left)
        assert_refused(sharded, str(shard), "truncated", "download it again")

    def test_truncated_message_counts(self, plain: Path) -> None:
        file = plain / "model.safetensors"
        size = file.stat().st_size
        os.truncate(file, size - 10)
        assert_refused(plain, f"truncated: {size - 10} bytes where its header promises {size}")

    def test_trailing_bytes(self, plain: Path) -> None:
        with (plain / "model.safetensors").open("ab") as stream:
            stream.write(b"xyz")
        assert_refused(plain, "3 bytes follow the last tensor")

    def test_truncated_after_it_was_opened(self, plain: Path) -> None:
        config, checkpoint = open_model(plain, verify="headers")
        os.truncate(plain / "model.safetensors", 200_000)
        with pytest.raises(CheckpointError, match="truncated after it was opened"):
            load_dense(checkpoint, config)

    def test_gone_after_it_was_opened(self, plain: Path) -> None:
        config, checkpoint = open_model(plain, verify="headers")
        (plain / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="cannot be opened"):
            load_dense(checkpoint, config)

    def test_git_lfs_pointer(self, plain: Path) -> None:
        (plain / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert_refused(plain, "Git LFS pointer", "git lfs pull")

    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such directory"):
            Checkpoint.open(tmp_path / "absent")

    @pytest.mark.parametrize(
        ("file", "why"),
        [
            (None, "neither model.safetensors nor model.safetensors.index.json"),
            ("pytorch_model.bin", "not as safetensors"),
            ("model-00001-of-000002.safetensors", "download the index"),
        ],
    )
    def test_no_weights(self, tmp_path: Path, file: str | None, why: str) -> None:
        if file is not None:
            (tmp_path / file).touch()
        with pytest.raises(CheckpointError, match=why):
            Checkpoint.open(tmp_path)

    @pytest.mark.parametrize(
        "shard", ["../other/model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x.bin", 3]
    )
    def test_an_index_may_not_point_elsewhere(self, sharded: Path, shard: object) -> None:
        index = sharded / "model.safetensors.index.json"
        raw = json.loads(index.read_text())
        raw["weight_map"]["lm_head.weight"] = shard
        index.write_text(json.dumps(raw))
        assert_refused(sharded, str(index), "lm_head.weight", "only safetensors files beside the index")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
    def test_not_an_index(self, sharded: Path, text: str) -> None:
        index = sharded / "model.safetensors.index.json"
        index.write_text(text)
        assert_refused(sharded, str(index), "download it again")


class TestValues:
    """NaN, infinity and negative scales: found by a full scan up front, and by whoever reads the slice."""

    NAN = float("nan")
    INF = float("inf")
    DAMAGE: tuple[tuple[str, tuple[int, ...], Callable[..., None], Any, str], ...] = (
        (GATE_PROJ, (159, 191), put_code, 0x7F, "is NaN or infinite"),
        (GATE_PROJ, (0, 0), put_code, 0xFF, "is NaN or infinite"),
        (GATE_PROJ + "_scale_inv", (1, 0), put, NAN, "is NaN or infinite"),
        (GATE_PROJ + "_scale_inv", (1, 1), put, INF, "is NaN or infinite"),
        (GATE_PROJ + "_scale_inv", (0, 1), put, -1e-3, "is a negative scale"),
        ("lm_head.weight", (271, 5), put, NAN, "is NaN or infinite"),
        ("model.norm.weight", (17,), put, -INF, "is NaN or infinite"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", (7,), put, NAN, "is NaN or infinite"),
    )

    @pytest.mark.parametrize(("name", "position", "damage", "value", "why"), DAMAGE)
    def test_full_scan_names_the_element(
        self,
        fp8: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        position: tuple[int, ...],
        damage: Callable[..., None],
        value: float,
        why: str,
    ) -> None:
        monkeypatch.setattr(reader, "CHUNK_BYTES", 8192)
        monkeypatch.setattr(reader, "_CHECK_BYTES", 1024)
        file = edit(fp8, lambda tensors: damage(tensors, name, position, value))
        assert_refused(fp8, str(file), f"tensor {name}: element {list(position)} {why}", "download", verify="full")
        assert_refused(fp8, name, why, verify="auto")

    @pytest.mark.parametrize(("name", "position", "damage", "value", "why"), DAMAGE)
    def test_whoever_reads_it_refuses_it(
        self, fp8: Path, name: str, position: tuple[int, ...], damage: Callable[..., None], value: float, why: str
    ) -> None:
        edit(fp8, lambda tensors: damage(tensors, name, position, value))
        config, checkpoint = open_model(fp8, verify="headers")
        is_expert = ".experts." in name
        with pytest.raises(CheckpointError, match=why):
            load_experts(checkpoint, config, [(1, 3)]) if is_expert else load_dense(checkpoint, config)
        # The slices of others are not affected.
        load_experts(checkpoint, config, [(1, 2), (2, 3)])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_each_plain_dtype(self, plain: Path, dtype: torch.dtype, value: float) -> None:
        def damage(tensors: Tensors) -> None:
            tensors[GATE_PROJ] = tensors[GATE_PROJ].to(dtype)
            tensors[GATE_PROJ][100, 100] = value

        edit(plain, damage)
        assert_refused(plain, GATE_PROJ, "[100, 100] is NaN or infinite", verify="full")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
    def test_extreme_finite_values_are_fine(self, fp8: Path, dtype: torch.dtype) -> None:
        def extremes(tensors: Tensors) -> None:
            limits = torch.finfo(dtype)
            values = torch.tensor([limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0]).to(dtype)
            tensors[GATE_PROJ] = torch.zeros(SHAPE).to(dtype)
            tensors[GATE_PROJ].view(torch.uint8)[0, : values.nbytes] = values.view(torch.uint8)
            if dtype != torch.float8_e4m3fn:
                del tensors[GATE_PROJ + "_scale_inv"]

        edit(fp8, extremes)
        open_model(fp8, verify="full")

    def test_a_scale_of_zero_is_an_all_zero_block(self, fp8: Path) -> None:
        edit(fp8, lambda tensors: put(tensors, GATE_PROJ + "_scale_inv", (0, 0), 0.0))
        config, checkpoint = open_model(fp8, verify="full")
        experts, _ = load_experts(checkpoint, config, [(1, 3)])
        decoded = experts[1, 3].gate_proj.decoded(torch.float32)
        assert not decoded[:128, :128].any()
        assert bool(decoded[128:].any())

    def test_a_large_checkpoint_is_not_read_up_front_unless_asked(
        self, fp8: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        edit(fp8, lambda tensors: put_code(tensors, GATE_PROJ, (0, 0), 0x7F))
        monkeypatch.setattr(loading, "AUTO_SCAN_BYTES", 10_000)
        open_model(fp8, verify="auto")
        assert_refused(fp8, GATE_PROJ, verify="full")

    def test_the_mtp_module_is_not_looked_at(self, tmp_path: Path) -> None:
        path = write_random_checkpoint(tmp_path, mtp=True)
        edit(path, lambda tensors: put(tensors, "model.layers.3.enorm.weight", (0,), self.NAN))
        config, _ = open_model(path, verify="full")
        assert config == ModelConfig.load(path)
