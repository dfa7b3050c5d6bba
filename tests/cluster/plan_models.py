"""Models for the tests of plans, by the values that were published."""

from __future__ import annotations

from moray.model.config import ModelConfig
from moray.model.deepseek_v3 import DEEPSEEK_V3_JSON

R1 = DEEPSEEK_V3_JSON

R1_CONFIG = ModelConfig.from_dict(R1)

SHORT_CONFIG = ModelConfig.from_dict(R1 | {"num_hidden_layers": 13})
"""R1 with 10 MoE layers instead of 58, for what takes a while to place."""
