"""The weights of a Llama model, in float32 and in the shape the forward pass wants them.

Query, key and value projections are stacked into one matrix, and so are the gate and up projections
of the MLP: fewer and larger matrix products. Matrices keep their (out, in) order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvx_server.engine.config import ModelConfig
from kvx_server.engine.errors import ModelFormatError
from kvx_server.engine.safetensors import SafetensorsFile

_INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one decoder layer, all float32.

    Attributes:
        attention_norm: (hidden_size,).
        query_key_value: ((num_heads + 2 * num_kv_heads) * head_dim, hidden_size).
        attention_output: (hidden_size, num_heads * head_dim).
        mlp_norm: (hidden_size,).
        gate_up: (2 * intermediate_size, hidden_size).
        down: (hidden_size, intermediate_size).
    """

    attention_norm: NDArray[np.float32]
    query_key_value: NDArray[np.float32]
    attention_output: NDArray[np.float32]
    mlp_norm: NDArray[np.float32]
    gate_up: NDArray[np.float32]
    down: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the whole model, all float32.

    Attributes:
        embedding: (vocab_size, hidden_size).
        layers: One per decoder layer.
        norm: (hidden_size,).
        head: (vocab_size, hidden_size); the embedding itself where the model ties them.
    """

    embedding: NDArray[np.float32]
    layers: tuple[LayerWeights, ...]
    norm: NDArray[np.float32]
    head: NDArray[np.float32]

    @classmethod
    def read(cls, folder: Path, config: ModelConfig) -> Weights:
        """Read `model.safetensors`, or the files its index names, from a model folder.

        Raises:
            ModelFormatError: A file or tensor is missing or damaged, or a tensor has another shape
                than the configuration says.
        """
        tensors = _Tensors(folder)
        embedding_shape = (config.vocab_size, config.hidden_size)
        embedding = tensors.read("model.embed_tokens.weight", embedding_shape)
        return cls(
            embedding=embedding,
            layers=tuple(_read_layer(tensors, config, n) for n in range(config.num_layers)),
            norm=tensors.read("model.norm.weight", (config.hidden_size,)),
            head=embedding if config.is_tied else tensors.read("lm_head.weight", embedding_shape),
        )


class _Tensors:
    """Every tensor of a model folder by name, whichever file it lies in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = _file_names(folder)
        self._files: dict[str, SafetensorsFile] = {}
        for file in (SafetensorsFile(folder / name) for name in names):
            self._files.update(dict.fromkeys(file.names, file))

    def read(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        file = self._files.get(name)
        if file is None:
            message = f"{self._folder} has no tensor {name!r}"
            raise ModelFormatError(message)
        tensor = file.read(name)
        if tensor.shape != shape:
            message = f"tensor {name!r} has shape {tensor.shape}, config.json makes it {shape}"
            raise ModelFormatError(message)
        return tensor


def _file_names(folder: Path) -> list[str]:
    """Return the names of the weight files, in order, without repetition."""
    index = folder / _INDEX_NAME
    if not index.exists():
        return ["model.safetensors"]
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{index} has no readable weight_map: {error!r}"
        raise ModelFormatError(message) from error
    for name in names:
        # An index may come from anywhere: it names files of its own folder and no others.
        if not isinstance(name, str) or Path(name).name != name:
            message = f"{index} names a file outside of its folder: {name!r}"
            raise ModelFormatError(message)
    return names


def _read_layer(tensors: _Tensors, config: ModelConfig, layer: int) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim

    def read(name: str, *shape: int) -> NDArray[np.float32]:
        return tensors.read(f"model.layers.{layer}.{name}.weight", shape)

    query = read("self_attn.q_proj", query_size, hidden)
    key = read("self_attn.k_proj", kv_size, hidden)
    value = read("self_attn.v_proj", kv_size, hidden)
    gate = read("mlp.gate_proj", inner, hidden)
    up = read("mlp.up_proj", inner, hidden)
    return LayerWeights(
        attention_norm=read("input_layernorm", hidden),
        query_key_value=np.concatenate([query, key, value]),
        attention_output=read("self_attn.o_proj", hidden, query_size),
        mlp_norm=read("post_attention_layernorm", hidden),
        gate_up=np.concatenate([gate, up]),
        down=read("mlp.down_proj", hidden, inner),
    )
