"""Engines for tests: tiny models with random weights, made here, and vLLM on CPU."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

# vLLM reads these when it is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # more wait for each other where CPUs are shared
}
BLOCK_TOKENS = 32
_SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Llama of two layers; its tokenizer is not needed, prompts are token ids."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_llama(path)
    return path


def make_llama(path: Path, **changes: object) -> None:
    """Write a Llama with random weights; `changes` are of its configuration."""
    import torch  # noqa: PLC0415 - not everybody who collects this has it
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SHAPE | changes, dtype="float32")
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)


def transfer_config(
    kvx_config: object, extra: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Return what vLLM is told of the connector: the tiers, and more of its extra configuration."""
    return {
        "kv_connector": "KvxConnector",
        "kv_connector_module_path": "kvx_vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": kvx_config, **(extra or {})},
    }


@contextlib.contextmanager
def open_engine(
    model: Path, kvx_config: object, *, extra: Mapping[str, object] | None = None, **options: object
) -> Iterator[Any]:
    """Open an engine of this process with the connector; its prefix cache is its own.

    Args:
        model: Of the weights.
        kvx_config: The tiers, as a mapping or a file.
        extra: More of `kv_connector_extra_config`.
        options: Of `vllm.LLM`.
    """
    from vllm import LLM  # noqa: PLC0415 - 6 seconds

    transfer = transfer_config(kvx_config, extra)
    llm = LLM(
        str(model), skip_tokenizer_init=True,
        **{
            "dtype": "float32", "enforce_eager": True, "max_model_len": 2048,
            "block_size": BLOCK_TOKENS, "max_num_seqs": 4, "kv_cache_memory_bytes": 64 << 20,
            "disable_log_stats": False, "kv_transfer_config": transfer, **options,
        },
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answer(llm: Any, prompt: list[int], max_tokens: int = 8) -> tuple[list[int], int]:
    """Return the greedy tokens after a prompt, and how many of its tokens were cached."""
    from vllm import SamplingParams  # noqa: PLC0415

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def settle(llm: Any) -> None:
    """Step the engine until nothing is on its way, and empty its own prefix cache."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests() or core.scheduler.connector.has_pending_push_work():
        llm.llm_engine.step()
    assert llm.reset_prefix_cache()
