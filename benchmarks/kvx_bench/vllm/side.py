"""The process of one engine; runs in a Python that has vLLM."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

from kvx_bench.answering import answer_requests

BLOCK_TOKENS = 32
_VOCABULARY = 4096
# 33 million parameters; the KV of a token takes 16 KiB.
_SHAPE: dict[str, Any] = {
    "vocab_size": _VOCABULARY, "hidden_size": 512, "intermediate_size": 2048,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
_KV_BYTES = 512 << 20
# Of the connector, what vLLM's own part of it takes included; a clock around every lookup of a
# block would cost more than the lookup.
_SCHEDULER = (
    "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc",
    "build_connector_meta", "update_connector_output", "take_events", "request_finished",
    "request_finished_all_groups", "get_kv_connector_stats",
)  # fmt: skip
_WORKER = ("submit_store", "submit_load", "get_finished")


def make_model(path: Path) -> None:
    """Write a Llama with random weights."""
    import torch  # noqa: PLC0415 - so that this module can be looked at without it
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SHAPE, dtype="float32")
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.float32).save_pretrained(path)


def transfer_config(how: str, directory: str) -> dict[str, Any] | None:
    """Return what vLLM is told of its connector; None for none.

    Args:
        how: ``none``, ``dram``, ``nvme``, or ``example``: vLLM's own connector to files.
        directory: Of the engine alone.
    """
    if how == "none":
        return None
    if how == "example":
        return {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": f"{directory}/example"},
        }
    tiers: list[dict[str, str]] = [{"kind": "dram", "capacity": "1GiB", "prefault": "eager"}]
    if how == "nvme":
        # Less than a prompt takes: it can only come from the disk.
        tiers = [
            {"kind": "dram", "capacity": "48MiB", "prefault": "eager"},
            {"kind": "nvme", "path": f"{directory}/nvme", "capacity": "2GiB"},
        ]
    return {
        "kv_connector": "KvxConnector",
        "kv_connector_module_path": "kvx_vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": {"tiers": tiers}},
    }


class Side:
    """One engine."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Open it; makes the model first if it is not there."""
        model = Path(request["model"])
        if not model.exists():
            make_model(model)
        from vllm import LLM, SamplingParams  # noqa: PLC0415 - 6 seconds

        self._parameters = SamplingParams
        transfer = transfer_config(request["how"], request["directory"])
        self._has_kvx = request["how"] in ("dram", "nvme")
        self._llm = LLM(
            str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
            max_model_len=request["max_tokens"], block_size=BLOCK_TOKENS, max_num_seqs=4,
            max_num_batched_tokens=request["max_tokens"], kv_cache_memory_bytes=_KV_BYTES,
            disable_log_stats=True,
            **({} if transfer is None else {"kv_transfer_config": transfer}),
        )  # fmt: skip
        self._core = self._llm.llm_engine.engine_core.engine_core
        self._clock = _Clock()
        if self._has_kvx:
            self._clock.watch("scheduler", self._core.scheduler.connector, _SCHEDULER)
            self._clock.watch("worker", _worker(), _WORKER)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        match request["do"]:
            case "open":
                return {}
            case "first":
                return self._first(request["prompt"], request["num_tokens"])
            case "many":
                return self._many(request["prompts"], request["num_tokens"], request["max_tokens"])
            case "costs":
                return self._clock.take()
        return {"error": f"an engine cannot {request['do']}"}

    def close(self) -> None:
        """Shut it down."""
        self._core.shutdown()

    def _first(self, prompt: int, num_tokens: int) -> dict[str, Any]:
        """Return when the first token came, which it was, and how much of the prompt was cached."""
        ((output,), wall_s, cpu_s) = self._generate([prompt], num_tokens, 1)
        self._settle()
        return {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "token": list(output.outputs[0].token_ids),
            "num_cached": output.num_cached_tokens or 0,
        }

    def _many(self, prompts: list[int], num_tokens: int, max_tokens: int) -> dict[str, Any]:
        _, wall_s, cpu_s = self._generate(prompts, num_tokens, max_tokens)
        self._settle()
        return {"wall_s": wall_s, "cpu_s": cpu_s}

    def _generate(self, prompts: list[int], num_tokens: int, max_tokens: int) -> tuple[Any, ...]:
        greedy = self._parameters(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": tokens_of(one, num_tokens)} for one in prompts]
        began, cpu = time.perf_counter(), time.process_time()
        outputs = self._llm.generate(given, greedy, use_tqdm=False)
        return outputs, time.perf_counter() - began, time.process_time() - cpu

    def _settle(self) -> None:
        """Let what is on its way arrive, and empty the engine's own cache."""
        scheduler = self._core.scheduler
        while scheduler.has_requests() or (
            scheduler.connector is not None and scheduler.connector.has_pending_push_work()
        ):
            self._llm.llm_engine.step()
        self._llm.reset_prefix_cache()
        if self._has_kvx:
            _worker()._rank_cache.cache.flush()  # noqa: SLF001 - outside of what is timed
        gc.collect()


class _Clock:
    """Adds up the CPU seconds of calls, by who is called."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._blocks = {"stored": 0, "loaded": 0}

    def watch(self, who: str, target: object, names: tuple[str, ...]) -> None:
        """Time these methods of an object."""
        for name in names:
            if hasattr(target, name):
                setattr(target, name, self._timed(who, name, getattr(target, name)))

    def take(self) -> dict[str, Any]:
        """Return seconds by who was called, and the blocks they were for; begins anew."""
        spent, blocks = self._spent, self._blocks
        self._spent, self._blocks = {}, {"stored": 0, "loaded": 0}
        return {"spent": spent, **blocks}

    def _timed(self, who: str, name: str, method: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*arguments, **named)
            finally:
                spent = time.thread_time() - began
                self._spent[who] = self._spent.get(who, 0.0) + spent
                if name == "submit_store":
                    self._blocks["stored"] += len(arguments[1].block_ids)
                if name == "submit_load":
                    self._blocks["loaded"] += len(arguments[2].block_ids)

        return timed


def tokens_of(prompt: int, num_tokens: int) -> list[int]:
    """Return the tokens of a prompt by its number; no two begin alike."""
    state, tokens = prompt * 2654435761 % (1 << 32), []
    for _ in range(num_tokens):
        state = (1664525 * state + 1013904223) % (1 << 32)
        tokens.append(3 + (state >> 8) % (_VOCABULARY - 3))
    return tokens


def _worker() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: PLC0415 - loads slowly

    return get_kv_transfer_group().connector_worker.worker


if __name__ == "__main__":
    answer_requests(Side)
