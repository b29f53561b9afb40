"""The engine computes the logits that `transformers` computes, on small random Llamas."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from kvx_server.engine import Engine, tiny_llama_folder

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers"
)

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
_RELATIVE_ERROR_MAX = 1e-4


def _save_random_llama(
    folder: Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16"],
    num_kv_heads: int,
    is_tied: bool,
    rope: dict[str, object],
    shard_size: str = "1GB",
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        rope_parameters=rope,
        tie_word_embeddings=is_tied,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer = (tiny_llama_folder() / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def _check_logits(folder: Path) -> None:
    """Compare the last logits of prompts in several places of a step, then of decoded tokens."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = np.random.default_rng(1).integers(0, 256, 150).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    engine = Engine.load(folder, num_blocks=16, block_tokens=16, step_blocks=2)
    block_ids = engine.allocator.allocate(10)
    for length in (1, 31, 32, 33, 140):
        _check_close(engine.prefill(tokens[:length], 0, block_ids), expected[length - 1])
    for position in range(140, 150):
        _check_close(engine.decode(tokens[position], position, block_ids), expected[position])


def _check_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < _RELATIVE_ERROR_MAX


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_logits_for_weights_and_heads(
    tmp_path: Path, dtype: Literal["float32", "float16", "bfloat16"], num_kv_heads: int
) -> None:
    _save_random_llama(tmp_path, dtype=dtype, num_kv_heads=num_kv_heads, is_tied=False, rope=_PLAIN)
    _check_logits(tmp_path)


@pytest.mark.parametrize("rope", [_PLAIN, _LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_logits_for_rope_and_embeddings(
    tmp_path: Path, rope: dict[str, object], *, is_tied: bool
) -> None:
    _save_random_llama(tmp_path, dtype="float32", num_kv_heads=2, is_tied=is_tied, rope=rope)
    _check_logits(tmp_path)


def test_logits_from_shards(tmp_path: Path) -> None:
    _save_random_llama(
        tmp_path, dtype="bfloat16", num_kv_heads=2, is_tied=True, rope=_LLAMA3, shard_size="100KB"
    )
    assert (tmp_path / "model.safetensors.index.json").exists()
    _check_logits(tmp_path)


def test_logits_and_tokens_of_the_tiny_model() -> None:
    folder = tiny_llama_folder()
    _check_logits(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The naïve “import” statement\n\t→ 终"
    ours = Engine.load(folder, num_blocks=1).tokenizer
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
