"""The architecture of a model, read from the `config.json` of its folder and checked.

Whatever the engine would compute wrongly (an unknown activation, a bias, a rope scaling it does not
know) is refused here, with the key and the value in the message, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from kvx_server.engine.errors import ModelFormatError

_Json: TypeAlias = Mapping[str, object]

# Keys that change the computation when they differ from these values.
_REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
_REQUIRED_KEYS = frozenset({"model_type"})


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Parameters of the rope scaling that Llama 3.1 introduced.

    Attributes:
        factor: How much slower the low frequencies turn.
        low_freq_factor: Wavelengths above `original_tokens / low_freq_factor` are slowed fully.
        high_freq_factor: Wavelengths below `original_tokens / high_freq_factor` are kept.
        original_tokens: Context length of the model before the scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_tokens: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a Llama-family model.

    Attributes:
        context_tokens: Longest sequence the model was made for.
        rope_scaling: None for plain rotary embeddings.
        begin_token: Token that starts a document, None where the model has none.
        end_tokens: Tokens that end a document; may be empty.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    is_tied: bool
    begin_token: int | None
    end_tokens: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Read `config.json` of a model folder.

        Raises:
            ModelFormatError: The file is missing, is not JSON, lacks a key, or asks for something
                that is not supported.
        """
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{path} cannot be read as JSON: {error}"
            raise ModelFormatError(message) from error
        if not isinstance(values, dict):
            message = f"{path} must hold a JSON object, found {type(values).__name__}"
            raise ModelFormatError(message)
        return cls.parse(values)

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> ModelConfig:
        """Build the configuration from the keys of a Hugging Face `config.json`.

        Raises:
            ModelFormatError: As for `read`.
        """
        _refuse_other_architectures(values)
        hidden_size = _integer(values, "hidden_size")
        num_heads = _integer(values, "num_attention_heads")
        num_kv_heads = _integer(values, "num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            message = (
                f"num_attention_heads ({num_heads}) must be a multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
            raise ModelFormatError(message)
        head_dim = _integer(values, "head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            message = f"head_dim must be even to be rotated, found {head_dim}"
            raise ModelFormatError(message)
        rope_theta, rope_scaling = _rope(values)
        return cls(
            vocab_size=_integer(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(values, "intermediate_size"),
            num_layers=_integer(values, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context_tokens=_integer(values, "max_position_embeddings", default=2048),
            rms_norm_eps=_number(values, "rms_norm_eps", default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            is_tied=bool(values.get("tie_word_embeddings", False)),
            begin_token=next(iter(_tokens(values, "bos_token_id")), None),
            end_tokens=_tokens(values, "eos_token_id"),
        )


def _refuse_other_architectures(values: _Json) -> None:
    for key, accepted in _REQUIRED_VALUES.items():
        if key not in values and key not in _REQUIRED_KEYS:
            continue
        if values.get(key) not in accepted:
            message = f"{key} = {values.get(key)!r} is not supported; accepted: {accepted}"
            raise ModelFormatError(message)


def _rope(values: _Json) -> tuple[float, Llama3Scaling | None]:
    """Return (theta, scaling) from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    table = values.get(key) or {}
    if not isinstance(table, dict):
        message = f"{key} must be an object or null, found {table!r}"
        raise ModelFormatError(message)
    theta = _number({**values, **table}, "rope_theta", default=10_000.0)
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        message = f"{key}.rope_type = {kind!r} is not supported; accepted: 'default', 'llama3'"
        raise ModelFormatError(message)
    scaling = Llama3Scaling(
        factor=_number(table, "factor"),
        low_freq_factor=_number(table, "low_freq_factor"),
        high_freq_factor=_number(table, "high_freq_factor"),
        original_tokens=_integer(table, "original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        message = f"{key}: high_freq_factor must be above low_freq_factor, found {table!r}"
        raise ModelFormatError(message)
    return theta, scaling


def _integer(values: _Json, key: str, *, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        message = f"{key} must be a positive integer, found {value!r}"
        raise ModelFormatError(message)
    return value


def _number(values: _Json, key: str, *, default: float | None = None) -> float:
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        message = f"{key} must be a positive number, found {value!r}"
        raise ModelFormatError(message)
    return float(value)


def _tokens(values: _Json, key: str) -> tuple[int, ...]:
    value = values.get(key)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in tokens):
        message = f"{key} must be a token, a list of tokens or null, found {value!r}"
        raise ModelFormatError(message)
    return tuple(tokens)
