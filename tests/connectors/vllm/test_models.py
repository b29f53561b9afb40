"""Models of other shapes than Llama's: the same tokens, from tiers and after failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kvx
from kvx_ext import _core
from tests.cache.faults import injected
from tests.connectors.vllm.below import Below, OneEngine, answers, hashes_of, prompt_of, store
from tests.connectors.vllm.engine import BLOCK_TOKENS, answer, open_engine, settle

_COMMON: dict[str, object] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
_GEMMA: dict[str, object] = {
    "num_hidden_layers": 6, "sliding_window": 64, "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2
    + ["full_attention"],
}  # fmt: skip
_MLA: dict[str, object] = {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 4, "first_k_dense_replace": 2,
    "moe_intermediate_size": 64, "head_dim": 64,
}  # fmt: skip
_KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3": ("Qwen3", {"num_key_value_heads": 1}),
    "gemma3": ("Gemma3", _GEMMA),
    "deepseek": ("DeepseekV2", _MLA),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make tiny models of a kind, with random weights."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            import torch  # noqa: PLC0415
            import transformers  # noqa: PLC0415

            name, shape = _KINDS[kind]
            config_type = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
            torch.manual_seed(0)
            config = getattr(transformers, config_type)(**_COMMON | shape, dtype="float32")
            model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32)
            made[kind] = tmp_path_factory.mktemp("models") / kind
            model.save_pretrained(made[kind])
        return made[kind]

    return make


@contextmanager
def open_failing(model: Path, path: Path, points: list[_core.Failpoints]) -> Iterator[Any]:
    """Open an engine over DRAM and NVMe; its failpoints take the place of what is in the list."""
    failpoints, faults = injected()
    points[:] = [failpoints]
    config = {
        "tiers": [
            {"kind": "dram", "capacity": "4MiB"},
            {"kind": "nvme", "path": str(path), "capacity": "64MiB"},
        ],
        "breaker": {"failures": 100_000, "reset_s": 0.1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvx.TieredCache, "open", partial(kvx.TieredCache.open, faults=faults))
        with open_engine(model, config, disable_hybrid_kv_cache_manager=False) as llm:
            yield llm


@pytest.fixture(scope="module")
def points() -> list[_core.Failpoints]:
    return []


@pytest.mark.parametrize("kind", list(_KINDS))
def test_a_model(
    one_engine: OneEngine,
    models: Callable[[str], Path],
    tmp_path: Path,
    points: list[_core.Failpoints],
    kind: str,
) -> None:
    import torch  # noqa: PLC0415

    has_amx: bool = torch.cpu._is_amx_tile_supported()
    if kind == "deepseek" and not has_amx:
        one_engine.close()
        check_refused(models(kind))
        return
    below = one_engine.get(kind, lambda: open_failing(models(kind), tmp_path, points))
    assert len(below.rank.groups) == (3 if kind == "gemma3" else 1)
    check_tiers(below)
    check_lost_blocks(below)
    check_damage(below, points[0])


def check_refused(model: Path) -> None:
    """Require that a model is refused which vLLM cannot compute from a prefix on."""
    config = {"tiers": [{"kind": "dram", "capacity": "4MiB"}]}
    with (
        pytest.raises(kvx.ConfigError, match="run this model without the connector"),
        open_engine(model, config),
    ):
        pass


def at_once(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return the answers to prompts that are asked together, each of them twice."""
    found = [tokens for tokens, _ in answers(llm, prompts * 2)]
    assert found[: len(prompts)] == found[len(prompts) :]
    return found[: len(prompts)]


def check_tiers(below: Below) -> None:
    """Require the same tokens from DRAM and from NVMe, alone and beside others."""
    llm = below.llm
    prompts = [prompt_of("model", 320), prompt_of("model", 160) + prompt_of("model else", 131)]
    computed = [answer(llm, prompt)[0] for prompt in prompts]
    below.check_nothing_leaked()
    for is_pushed in (False, True):
        if is_pushed:
            below.push_down()
        for prompt, wanted in zip(prompts, computed, strict=True):
            tokens, num_cached = answer(llm, prompt)
            assert tokens == wanted
            assert num_cached >= (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        below.check_nothing_leaked()
        assert at_once(llm, prompts) == computed
        below.check_nothing_leaked()


def check_lost_blocks(below: Below) -> None:
    """Require it of a prompt that lost blocks of one group, before and after it was looked up."""
    llm, prompt = below.llm, prompt_of("lost", 300)
    computed, hashes = store(llm, prompt), hashes_of(below.llm, prompt)
    for group in range(len(below.rank.groups)):
        for place in (0, 5):
            below.drop(hashes[place : place + 1], group)
            assert answer(llm, prompt)[0] == computed
            below.check_nothing_leaked()
            prepare = below.manager.prepare_load

            def lose(*args: object, group: int = group, place: int = place) -> object:
                below.drop(hashes[place : place + 1], group)
                return prepare(*args)  # noqa: B023 - called inside the loop

            below.manager.prepare_load = lose
            assert answer(llm, prompt)[0] == computed
            below.manager.prepare_load = prepare
            below.check_nothing_leaked()


def check_damage(below: Below, failpoints: _core.Failpoints) -> None:
    """Require it of loads that fail in part, and of those that all fail."""
    llm = below.llm
    prompts = [prompt_of(f"damaged {n}", 200 + 40 * n) for n in range(2)]
    computed = [answer(llm, prompt)[0] for prompt in prompts]
    for action, share in (("flip", 0.3), ("eio", 1.0)):
        settle(llm)
        below.push_down()
        before = below.count("kvx_transfers_total", verb="onboard", state="done")
        failpoints.set("read", action, probability=share, seed=3)
        assert at_once(llm, prompts) == computed
        failpoints.clear()
        assert below.count("kvx_transfers_total", verb="onboard", state="done") > before
        below.check_nothing_leaked()
