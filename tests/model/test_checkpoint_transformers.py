"""Random checkpoints are ones Hugging Face loads whole, and it sees the values that Moray sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from moray.model.loading import LowRankQuery, StoredMoe, load_dense, load_experts, open_model
from moray.model.testing import SPECIAL_TOKENS, WeightDtype, dequantized_copy, write_random_checkpoint

YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 512,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize(
    ("dtype", "overrides", "tied", "mtp"),
    [
        ("float32", {}, False, False),
        ("float32", {"q_lora_rank": None}, True, False),
        ("bfloat16", {"n_shared_experts": 2, "rope_scaling": YARN}, False, False),
        ("fp8", {}, False, True),
        ("fp8", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, True, False),
    ],
    ids=["fp32", "fp32-direct-query-tied", "bf16-two-shared-yarn", "fp8-mtp", "fp8-direct-query-tied-one-group"],
)
def test_transformers_loads_the_fp32_copy_whole(
    tmp_path: Path, dtype: WeightDtype, overrides: dict[str, object], tied: bool, mtp: bool
) -> None:
    source = write_random_checkpoint(tmp_path / "source", overrides, dtype=dtype, tied=tied, mtp=mtp, shards=2)
    copy = dequantized_copy(source, tmp_path / "copy")
    model, info = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, DeepseekV3ForCausalLM)
    assert {key: value for key, value in info.items() if value} == {}

    config, checkpoint = open_model(source)
    dense, _ = load_dense(checkpoint, config)
    fp32 = torch.float32
    assert torch.equal(model.model.embed_tokens.weight, dense.embed_tokens.to(fp32))
    assert torch.equal(model.lm_head.weight, dense.lm_head.decoded(fp32))
    layer, ours = model.model.layers[1], dense.layers[1]
    if isinstance(ours.attention.query, LowRankQuery):
        assert torch.equal(layer.self_attn.q_b_proj.weight, ours.attention.query.q_b_proj.decoded(fp32))
    else:
        assert torch.equal(layer.self_attn.q_proj.weight, ours.attention.query.decoded(fp32))
    assert isinstance(ours.mlp, StoredMoe)
    assert ours.mlp.e_score_correction_bias is not None
    assert torch.equal(layer.mlp.gate.e_score_correction_bias, ours.mlp.e_score_correction_bias)
    experts, _ = load_experts(checkpoint, config, [(1, 6)])
    joined = torch.cat([experts[1, 6].gate_proj.decoded(fp32), experts[1, 6].up_proj.decoded(fp32)])
    assert torch.equal(layer.mlp.experts.gate_up_proj[6], joined)
    assert torch.equal(layer.mlp.experts.down_proj[6], experts[1, 6].down_proj.decoded(fp32))


def test_activations_and_logits_are_sane(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        output = model(torch.arange(10, 138)[None], output_hidden_states=True)
    for hidden_states in output.hidden_states:
        assert 0.5 < hidden_states.std() < 5
    assert 2 < output.logits.std() < 8
    assert len(output.logits[0].argmax(-1).unique()) > 20  # not one token over and over


def test_the_correction_bias_changes_many_choices_but_not_all(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    gate = model.model.layers[1].mlp.gate
    hidden_states = torch.randn(512, 192, generator=torch.Generator().manual_seed(0))
    scores = (hidden_states @ gate.weight.T).sigmoid()
    changed = (scores + gate.e_score_correction_bias).argmax(-1) != scores.argmax(-1)
    assert 0.05 < changed.float().mean() < 0.8


def test_the_tokenizer_is_byte_level(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "Zwölf Boxkämpfer, 深度\n\t🦈 <think>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()) - len("<think>") + 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS)))) == list(SPECIAL_TOKENS)
    assert len(tokenizer) <= json.loads((path / "config.json").read_text())["vocab_size"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size = 256 is too small"):
        write_random_checkpoint(tmp_path, {"vocab_size": 256})
