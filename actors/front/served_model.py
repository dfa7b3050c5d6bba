"""What the front knows about the model it serves."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...configs.errors import CheckpointError, ConfigError
from ...model.config import ModelConfig
from ...model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that does not say otherwise is sampled with: the checkpoint's `generation_config.json`.

    DeepSeek publishes 0.6 and 0.95 with R1, and warns of endless repetition with other values. Where the file is
    missing, OpenAI's defaults hold.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def load(cls, checkpoint: Path) -> SamplingDefaults:
        """Read `generation_config.json`.

        Raises:
            CheckpointError: the file is damaged or holds a value out of range.
        """
        raw = _generation_config(checkpoint)
        if raw.get("do_sample") is False:
            return cls(temperature=0.0)
        return cls(
            temperature=_number(raw, checkpoint, "temperature", 1.0, 0.0, 2.0),
            top_p=_number(raw, checkpoint, "top_p", 1.0, 1e-6, 1.0),
            top_k=int(_number(raw, checkpoint, "top_k", 0, 0, 1 << 31)),
            min_p=_number(raw, checkpoint, "min_p", 0.0, 0.0, 1.0),
        )


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as clients see it.

    Attributes:
        name: its id in /v1/models; requests must name it.
        tokenizer: the checkpoint's.
        max_context: tokens of prompt and answer together.
        vocab_size: rows of the embedding; a prompt's token ids lie below.
        eos_token_ids: tokens that end an answer.
        defaults: sampling of requests that do not say.
        created: Unix time in seconds, as /v1/models shows it.
    """

    name: str
    tokenizer: Tokenizer
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults = SamplingDefaults()
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def load(cls, checkpoint: Path, *, name: str, max_context: int | None = None) -> ServedModel:
        """Read everything the front needs from a checkpoint directory; no weights.

        Args:
            checkpoint: a directory in the published layout.
            name: the id clients will use.
            max_context: tokens; None takes the model's own.

        Raises:
            CheckpointError: a file is missing, damaged or not supported.
            ConfigError: `max_context` exceeds what the model was made for.
        """
        config = ModelConfig.load(checkpoint)
        longest = config.max_position_embeddings
        if max_context is not None and not 2 <= max_context <= longest:
            raise ConfigError(f"max_context = {max_context}: must be from 2 to the model's own {longest} tokens")
        tokenizer = Tokenizer.load(checkpoint)
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{checkpoint / 'tokenizer.json'}: has {tokenizer.vocab_size} tokens, but the model's vocab_size is "
                f"{config.vocab_size}; the files are from different checkpoints"
            )
        listed = _generation_config(checkpoint).get("eos_token_id", [])
        eos = {*config.eos_token_ids, *(listed if isinstance(listed, list) else [listed])}
        if tokenizer.eos_token_id is not None:
            eos.add(tokenizer.eos_token_id)
        for token_id in eos:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
                raise CheckpointError(
                    f"{checkpoint}: eos_token_id = {token_id!r} is not an id below vocab_size = {config.vocab_size}"
                )
        return cls(
            name=name,
            tokenizer=tokenizer,
            max_context=longest if max_context is None else max_context,
            vocab_size=config.vocab_size,
            eos_token_ids=tuple(sorted(eos)),
            defaults=SamplingDefaults.load(checkpoint),
        )


def _generation_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "generation_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again or remove it") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, not an object; download it again or remove it")
    return raw


def _number(raw: dict[str, Any], checkpoint: Path, key: str, default: float, least: float, most: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise CheckpointError(
            f"{checkpoint / 'generation_config.json'}: {key} = {value!r}: must be a number from {least:g} to {most:g}"
        )
    return float(value)
