"""Weights are found through the index, and a wrong tensor is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvx_server.engine import tiny_llama_folder
from kvx_server.engine.config import ModelConfig
from kvx_server.engine.errors import ModelFormatError
from kvx_server.engine.weights import Weights


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.read(tiny_llama_folder())


def test_tied_head_is_the_embedding(config: ModelConfig) -> None:
    weights = Weights.read(tiny_llama_folder(), config)
    assert weights.head is weights.embedding
    assert len(weights.layers) == config.num_layers


def test_missing_tensor_is_named(config: ModelConfig) -> None:
    with pytest.raises(ModelFormatError, match=r"no tensor 'lm_head\.weight'"):
        Weights.read(tiny_llama_folder(), replace(config, is_tied=False))


def test_wrong_shape_is_named(config: ModelConfig) -> None:
    with pytest.raises(ModelFormatError, match=r"layers\.0\.mlp\.gate_proj"):
        Weights.read(tiny_llama_folder(), replace(config, intermediate_size=10))


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "weight_map"),
        ("[]", "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside"),
        ('{"weight_map": {"a": 1}}', "outside"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "cannot be opened"),
    ],
)
def test_refuses_bad_index(tmp_path: Path, config: ModelConfig, index: str, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ModelFormatError, match=reason):
        Weights.read(tmp_path, config)


def test_reads_through_index(tmp_path: Path, config: ModelConfig) -> None:
    shutil.copy(tiny_llama_folder() / "model.safetensors", tmp_path / "part-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "part-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    weights = Weights.read(tmp_path, config)
    assert (weights.norm == Weights.read(tiny_llama_folder(), config).norm).all()
