"""The checkpoints that speeds are compared on: their size, and that Moray and Hugging Face read the same tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import transformers

from moray import LLM
from moray.model.config import ModelConfig
from moray.model.tensor_names import TensorNames
from moray.model.tokenizer import Tokenizer

from .make_checkpoint import MODELS, make_checkpoint

TEXT = "the quick brown fox, 123 Äß 🙂\n  jumps"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a vocabulary as large as mid's."""
    return make_checkpoint("tiny", tmp_path_factory.mktemp("tiny"), fp8=True, changes={"vocab_size": 32000})


@pytest.mark.parametrize(("name", "millions"), [("mid", 1395), ("tiny", 8)])
def test_parameters(name: str, millions: int) -> None:
    names = TensorNames(ModelConfig.from_dict(dict(MODELS[name])))
    elements = sum(math.prod(tensor.shape) for tensor in [*names.dense(), *names.routed_experts()])
    assert round(elements / 1e6) == millions


def test_greedy_answers_do_not_fall_into_one_token(tiny: Path) -> None:
    prompts = [[token] * 3 for token in (300, 5000, 31000)]
    with LLM(str(tiny), experts=2) as llm:
        answers = llm.generate(prompts, temperature=0, max_tokens=24, ignore_eos=True)
    for answer in answers:
        assert len(answer.token_ids) == 24
        assert len(set(answer.token_ids)) > 16, answer.token_ids


def test_every_id_is_text_and_text_comes_back(tiny: Path) -> None:
    ours = Tokenizer.load(tiny)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tiny))
    assert (ours.vocab_size, len(theirs)) == (32000, 32000)
    assert all(ours.token_bytes(token) for token in range(32000))
    ids = ours.encode(TEXT, add_special_tokens=False)
    assert theirs.encode(TEXT, add_special_tokens=False) == ids
    assert (ours.decode(ids), theirs.decode(ids)) == (TEXT, TEXT)
    assert len(ids) < 0.75 * len(TEXT.encode())
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
