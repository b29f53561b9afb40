"""A configuration is read whole, and what the engine cannot compute is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvx_server.engine.config import Llama3Scaling, ModelConfig
from kvx_server.engine.errors import ModelFormatError

_MINIMAL: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LLAMA3: dict[str, object] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults() -> None:
    config = ModelConfig.parse(_MINIMAL)
    assert config.num_kv_heads == 4
    assert config.head_dim == 16
    assert config.rope_theta == 10_000.0
    assert config.rope_scaling is None
    assert not config.is_tied
    assert config.begin_token is None
    assert config.end_tokens == ()


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 5e5, "rope_scaling": _LLAMA3},
        {"rope_theta": 1.0, "rope_parameters": {**_LLAMA3, "rope_theta": 5e5}},
    ],
    ids=["rope_scaling", "rope_parameters"],
)
def test_llama3_scaling_in_both_spellings(values: dict[str, object]) -> None:
    config = ModelConfig.parse({**_MINIMAL, **values, "eos_token_id": [1, 2], "bos_token_id": 0})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert config.end_tokens == (1, 2)
    assert config.begin_token == 0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"model_type": None}, "model_type = None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": None}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 15}, "even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {**_LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ],
)
def test_refuses(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelFormatError, match=reason):
        ModelConfig.parse({**_MINIMAL, **values})


@pytest.mark.parametrize("text", [None, "{", "[]", "\x00"])
def test_refuses_unreadable_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        ModelConfig.read(tmp_path)
