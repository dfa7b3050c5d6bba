"""Reading slices: every value as stored, every byte accounted for, damage found on the way."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moray.configs.errors import CheckpointError
from moray.model import reader
from moray.model.checkpoint import Checkpoint, total_bytes
from moray.model.config import ModelConfig
from moray.model.loading import (
    DenseWeights,
    LowRankQuery,
    StoredLinear,
    StoredMlp,
    StoredMoe,
    load_dense,
    load_experts,
    open_model,
)
from moray.model.progress import Advance
from moray.model.reader import read_tensors, scan_tensors
from moray.model.tensor_names import TensorNames
from moray.model.testing import WeightDtype, dequantized_copy, write_random_checkpoint


class Pread:
    """Stands in for `os.preadv`: notes every byte range read, and may return fewer bytes than asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: Callable[[int], int] = lambda wanted: wanted) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.limit = limit
        self.real = os.preadv
        self.lock = threading.Lock()
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        (buffer,) = buffers
        count = self.real(descriptor, [buffer[: self.limit(len(buffer))]], offset)
        with self.lock:
            self.ranges.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), offset, count))
        return count


class Recorded:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int]] = []
        self.advances: list[int] = []

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:
        self.tasks.append((description, total_bytes))
        yield self.advances.append


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("fp8"), dtype="fp8", shards=3, mtp=True)


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The whole checkpoint as the safetensors package reads it: the oracle."""
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert torch.equal(ours.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def assert_linear(linear: StoredLinear, name: str, stored: dict[str, torch.Tensor]) -> None:
    assert_same_bits(linear.weight, stored[name])
    scale_inv = stored.get(name + "_scale_inv")
    if scale_inv is None:
        assert linear.scale_inv is None
    else:
        assert linear.scale_inv is not None
        assert_same_bits(linear.scale_inv, scale_inv)


def assert_mlp(mlp: StoredMlp, prefix: str, stored: dict[str, torch.Tensor]) -> None:
    assert_linear(mlp.gate_proj, f"{prefix}.gate_proj.weight", stored)
    assert_linear(mlp.up_proj, f"{prefix}.up_proj.weight", stored)
    assert_linear(mlp.down_proj, f"{prefix}.down_proj.weight", stored)


def assert_dense(dense: DenseWeights, config: ModelConfig, stored: dict[str, torch.Tensor]) -> None:
    assert_same_bits(dense.embed_tokens, stored["model.embed_tokens.weight"])
    assert_same_bits(dense.norm, stored["model.norm.weight"])
    assert_linear(
        dense.lm_head, "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight", stored
    )
    assert len(dense.layers) == config.num_hidden_layers
    for index, layer in enumerate(dense.layers):
        prefix = f"model.layers.{index}"
        assert_same_bits(layer.input_layernorm, stored[f"{prefix}.input_layernorm.weight"])
        assert_same_bits(layer.post_attention_layernorm, stored[f"{prefix}.post_attention_layernorm.weight"])
        attention = layer.attention
        if isinstance(attention.query, LowRankQuery):
            assert config.q_lora_rank is not None
            assert_linear(attention.query.q_a_proj, f"{prefix}.self_attn.q_a_proj.weight", stored)
            assert_same_bits(attention.query.q_a_layernorm, stored[f"{prefix}.self_attn.q_a_layernorm.weight"])
            assert_linear(attention.query.q_b_proj, f"{prefix}.self_attn.q_b_proj.weight", stored)
        else:
            assert config.q_lora_rank is None
            assert_linear(attention.query, f"{prefix}.self_attn.q_proj.weight", stored)
        assert_linear(attention.kv_a_proj_with_mqa, f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", stored)
        assert_same_bits(attention.kv_a_layernorm, stored[f"{prefix}.self_attn.kv_a_layernorm.weight"])
        assert_linear(attention.kv_b_proj, f"{prefix}.self_attn.kv_b_proj.weight", stored)
        assert_linear(attention.o_proj, f"{prefix}.self_attn.o_proj.weight", stored)
        if isinstance(layer.mlp, StoredMoe):
            assert index in config.moe_layers
            assert_linear(layer.mlp.gate, f"{prefix}.mlp.gate.weight", stored)
            bias = layer.mlp.e_score_correction_bias
            assert (bias is not None) == config.has_correction_bias
            if bias is not None:
                assert_same_bits(bias, stored[f"{prefix}.mlp.gate.e_score_correction_bias"])
            assert (layer.mlp.shared_experts is not None) == (config.n_shared_experts > 0)
            if layer.mlp.shared_experts is not None:
                assert_mlp(layer.mlp.shared_experts, f"{prefix}.mlp.shared_experts", stored)
        else:
            assert index not in config.moe_layers
            assert_mlp(layer.mlp, f"{prefix}.mlp", stored)


V2_GATE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "q_lora_rank": None,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize(
    ("overrides", "tied", "shards"),
    [
        ({}, False, 1),
        ({"q_lora_rank": None}, True, 4),
        ({"n_shared_experts": 2}, False, 2),
        ({"n_shared_experts": 0, "first_k_dense_replace": 0}, False, 1),
        (V2_GATE, False, 1),
    ],
    ids=["low-rank query", "direct query, tied", "two shared experts", "no shared experts, no dense layer", "V2 gate"],
)
def test_what_is_loaded_is_what_is_stored(
    tmp_path: Path, dtype: WeightDtype, overrides: dict[str, object], tied: bool, shards: int
) -> None:
    path = write_random_checkpoint(tmp_path / "model", overrides, dtype=dtype, tied=tied, shards=shards)
    config, checkpoint = open_model(path, verify="full")
    stored = stored_tensors(path)
    dense, _ = load_dense(checkpoint, config)
    assert_dense(dense, config, stored)
    everything = [(layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts)]
    experts, _ = load_experts(checkpoint, config, everything)
    assert list(experts) == everything
    for (layer, expert), weights in experts.items():
        assert_mlp(weights, f"model.layers.{layer}.mlp.experts.{expert}", stored)


def test_a_host_reads_the_bytes_of_its_slices_and_no_others(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, checkpoint = open_model(fp8, verify="headers")
    slots = [(1, 0), (2, 3), (1, 0), (2, 7)]
    names = TensorNames(config)
    slices = {
        (entry.file.name, entry.offset, entry.nbytes)
        for layer, expert in slots
        for tensor in names.expert(layer, expert)
        for entry in checkpoint.locate(tensor, config).entries
    }
    pread = Pread(monkeypatch)
    experts, read = load_experts(checkpoint, config, slots)
    assert set(experts) == set(slots)
    # Each slice is below one chunk here, so each is one read; the expert that fills two slots is read once.
    assert sorted(pread.ranges) == sorted(slices)
    assert read.data == sum(nbytes for _, _, nbytes in slices) == sum(expert.nbytes for expert in experts.values())


def test_headers_are_counted_apart(fp8: Path) -> None:
    config, checkpoint = open_model(fp8, verify="headers")
    expected = (fp8 / "model.safetensors.index.json").stat().st_size
    for file in fp8.glob("*.safetensors"):
        with file.open("rb") as stream:
            expected += 8 + int.from_bytes(stream.read(8), "little")
    _, read = load_dense(checkpoint, config)
    assert read.headers == expected


def test_router_and_hosts_together_read_the_model_once_and_the_mtp_module_never(fp8: Path) -> None:
    config, checkpoint = open_model(fp8, verify="headers")
    everything = [(layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts)]
    _, router = load_dense(checkpoint, config)
    hosts = [load_experts(checkpoint, config, everything[index::3])[1] for index in range(3)]
    mtp = [entry for name, entry in checkpoint.tensors.items() if name.startswith("model.layers.3.")]
    assert mtp
    read = router.data + sum(host.data for host in hosts)
    assert read == total_bytes(checkpoint.tensors.values()) - total_bytes(mtp)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("at_most", [1, 7, 1000], ids=lambda at_most: f"{at_most} bytes a read")
def test_chunks_and_short_reads_are_put_together(
    fp8: Path, monkeypatch: pytest.MonkeyPatch, threads: int, at_most: int
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 4096)
    _, checkpoint = open_model(fp8, verify="headers")
    names = ["model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
    if at_most == 1000:
        names += ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"]
    pread = Pread(monkeypatch, lambda wanted: min(wanted, at_most))
    tensors, read = read_tensors((checkpoint.tensors[name] for name in names), threads=threads)
    stored = stored_tensors(fp8)
    for name in names:
        assert_same_bits(tensors[name], stored[name])
    assert read == sum(count for _, _, count in pread.ranges) == sum(stored[name].nbytes for name in names)


def test_a_scan_reads_all_and_keeps_one_chunk_a_thread(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 4096)
    config, checkpoint = open_model(fp8, verify="headers")
    allocated: list[int] = []
    real = np.empty

    def empty(size: int, dtype: type) -> object:
        allocated.append(size)
        return real(size, dtype=dtype)

    monkeypatch.setattr(np, "empty", empty)
    entries = checkpoint.model_entries(config)
    assert scan_tensors(entries, threads=3) == total_bytes(entries)
    assert 1 <= len(allocated) <= 3
    assert set(allocated) == {4096}


def test_progress_adds_up(fp8: Path) -> None:
    config, checkpoint = open_model(fp8, verify="headers")
    progress = Recorded()
    _, read = load_dense(checkpoint, config, progress=progress, description="router 0")
    assert progress.tasks == [("router 0", read.data)]
    assert sum(progress.advances) == read.data


def test_an_entry_given_twice_is_read_once(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Checkpoint.open(fp8).tensors["lm_head.weight"]
    pread = Pread(monkeypatch)
    assert read_tensors([entry, entry])[1] == scan_tensors([entry, entry]) == entry.nbytes
    assert len(pread.ranges) == 2


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path)
    assert not (path / "model.safetensors.index.json").exists()
    assert open_model(path)[1].tensors.keys() == stored_tensors(path).keys()


def test_links_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache holds links into a blob store."""
    blobs = write_random_checkpoint(tmp_path / "blobs", shards=2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    config, checkpoint = open_model(snapshot)
    load_dense(checkpoint, config)


def test_no_such_expert(fp8: Path) -> None:
    config, checkpoint = open_model(fp8, verify="headers")
    for slot in [(0, 0), (1, 8), (1, -1), (9, 0)]:
        with pytest.raises(ValueError, match=rf"no routed expert {slot[1]} in layer {slot[0]}"):
            load_experts(checkpoint, config, [slot])


def test_float16_is_plain(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path)
    halves = {name: tensor.half() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(halves, path / "model.safetensors")
    config, checkpoint = open_model(path, verify="full")
    dense, _ = load_dense(checkpoint, config)
    assert torch.equal(dense.lm_head.decoded(torch.float32), halves["lm_head.weight"].float())


def test_fp32_copy_of_an_fp8_checkpoint_has_equal_values(fp8: Path, tmp_path: Path) -> None:
    copy = dequantized_copy(fp8, tmp_path / "copy")
    config, checkpoint = open_model(fp8)
    copied_config, copied = open_model(copy)
    assert dataclasses.replace(config, weights_are_fp8=False, num_nextn_predict_layers=0) == copied_config
    slots = [(1, 2), (2, 5)]
    experts, copied_experts = (
        load_experts(*pair, slots)[0] for pair in ((checkpoint, config), (copied, copied_config))
    )
    for slot in slots:
        assert experts[slot].down_proj.weight.dtype == torch.float8_e4m3fn
        assert torch.equal(
            experts[slot].down_proj.decoded(torch.float32), copied_experts[slot].down_proj.decoded(torch.float32)
        )
    assert not any(name.startswith("model.layers.3.") for name in copied.tensors)
    with_mtp = dequantized_copy(fp8, tmp_path / "with mtp", mtp=True)
    assert "model.layers.3.eh_proj.weight" in open_model(with_mtp)[1].tensors


def test_the_same_seed_is_the_same_model_however_it_is_stored(tmp_path: Path) -> None:
    one = write_random_checkpoint(tmp_path / "one", seed=3)
    three = write_random_checkpoint(tmp_path / "three", seed=3, shards=3)
    other = write_random_checkpoint(tmp_path / "other", seed=4)
    stored = stored_tensors(one)
    for name, tensor in stored_tensors(three).items():
        assert torch.equal(tensor, stored[name])
    assert not torch.equal(stored["lm_head.weight"], stored_tensors(other)["lm_head.weight"])
    assert len(list(three.glob("*.safetensors"))) == 3
    with safe_open(one / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_damage_found_while_reading_names_the_file(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, checkpoint = open_model(fp8, verify="headers")

    def fail(descriptor: int, buffers: object, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        CheckpointError, match=r"model-0000\d-of-000003\.safetensors.*Input/output error.*check the disk"
    ):
        load_dense(checkpoint, config)


def test_after_an_error_the_other_threads_stop(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unreadable tensor must not cost the time of reading 600 GB."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 256)
    config, checkpoint = open_model(fp8, verify="headers")
    reads: list[int] = []
    failed = threading.Event()
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        reads.append(offset)
        if threading.current_thread().name.endswith("_2"):
            failed.set()
            raise OSError(5, "Input/output error")
        assert failed.wait(10)
        time.sleep(0.001)  # so slow that the rest of the file would take seconds
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    chunks = total_bytes(checkpoint.model_entries(config)) // 256
    with pytest.raises(CheckpointError, match="Input/output error"):
        scan_tensors(checkpoint.model_entries(config), threads=4)
    assert len(reads) < chunks // 2
