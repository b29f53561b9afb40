"""What lies below an engine of this process: who holds what, and ways to force and damage it."""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import kvx
from kvx_vllm.rank_cache import RankCache, rank_cache_here
from tests.cache.faults import sample
from tests.connectors.vllm.engine import BLOCK_TOKENS, settle

_JUNK = {"model": "junk", "dtype": "junk"}


@dataclass(slots=True)
class Below:
    """The cache of an engine, and the engine's scheduler.

    Attributes:
        llm: The engine.
        rank: Its only rank.
    """

    llm: Any
    rank: RankCache
    _num_junk: int = 0

    @classmethod
    def of(cls, llm: Any) -> Below:
        """Find it."""
        engine_id = llm.llm_engine.vllm_config.kv_transfer_config.engine_id
        rank = rank_cache_here(engine_id, 0)
        assert rank is not None
        return cls(llm, rank)

    @property
    def scheduler(self) -> Any:
        """Return vLLM's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def manager(self) -> Any:
        """Return the connector's half there."""
        return self.scheduler.connector.scheduler.manager

    @property
    def worker(self) -> Any:
        """Return the connector's half in the worker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: PLC0415

        return get_kv_transfer_group().connector_worker.worker

    @property
    def kv(self) -> list[Any]:
        """Return the engine's KV cache, a tensor a layer."""
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        return list(worker.model_runner.kv_caches)

    def count(self, name: str, **labels: str) -> float:
        """Return one of kvx's metrics."""
        return sample(self.rank.cache, name, **labels)

    def push_down(self) -> None:
        """Write out what waits for that, and push everything out of DRAM."""
        assert self.rank.cache.flush(20.0)
        for size in {group.space.block_bytes for group in self.rank.groups}:
            space = self.rank.cache.namespace(**_JUNK, block_bytes=size)
            count = 2 * self.rank.cache.config.dram.capacity_bytes // size
            block = np.zeros((1, size), np.uint8)
            for _ in range(count):  # one by one: S3 takes groups only
                self._num_junk += 1
                space.offload([self._num_junk.to_bytes(8, "big")], block).wait()
        assert self.rank.cache.flush(20.0)

    def held(self, hashes: list[bytes], group: int = 0) -> list[str]:
        """Return the tier of each block; "none" where none holds it."""
        tiers = self.rank.locate(group, hashes, 0).tiers
        return [kvx.TierKind(int(tier)).name.lower() for tier in tiers]

    def drop(self, hashes: list[bytes], group: int = 0) -> None:
        """Forget blocks in every tier."""
        self.rank.groups[group].space.drop(hashes)

    def flip(self, hashes: list[bytes], group: int = 0) -> int:
        """Flip a bit of each block's copy in DRAM; returns how many blocks that were."""
        space = self.rank.groups[group].space
        flipped = 0
        for one in hashes:
            with space.lease([one]) as lease:
                for address in lease.addresses.tolist():
                    byte = ctypes.c_uint8.from_address(address + space.block_bytes // 3)
                    byte.value ^= 4
                    flipped += 1
        return flipped

    def check_nothing_leaked(self) -> None:
        """Require that nothing is under way, and that nobody keeps a block."""
        settle(self.llm)
        offloading = self.scheduler.connector.scheduler
        under_way = (
            self.manager._requests, self.worker._jobs, offloading._req_status, offloading._jobs,
            offloading._block_id_to_pending_jobs, self.scheduler.requests,
            self.worker._bad_blocks, self.worker.peek_failures(),
        )  # fmt: skip
        assert not any(under_way), [len(one) for one in under_way]
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not any(bool(one.isnan().any()) for one in self.kv), "NaN is left in the engine"
        assert self.rank.cache.flush(20.0)
        self.rank.cache.check_integrity()
        stats = self.rank.cache.stats()
        for tier in ("dram", "nvme"):
            leaked = Counter({name: stats.get(tier, {}).get(name, 0) for name in _KEPT})
            assert not leaked.total(), f"{tier}: {leaked}"


_KEPT = ("pinned", "reserved", "doomed")


class OneEngine:
    """At most one engine of this process: two of them would share vLLM's globals."""

    def __init__(self) -> None:
        self._name = ""
        self._opened = ExitStack()
        self._below: Below | None = None

    def get(self, name: str, make: Callable[[], AbstractContextManager[Any]]) -> Below:
        """Return the engine of a name; another one is closed, and it is opened, where needed."""
        if self._below is None or name != self._name:
            self.close()
            self._below = Below.of(self._opened.enter_context(make()))
            self._name = name
        return self._below

    def close(self) -> None:
        """Close the engine that is open."""
        self._below = None
        self._opened.close()


@pytest.fixture(scope="module")
def one_engine() -> Iterator[OneEngine]:
    """Keep an engine open over tests, and close it after the module."""
    engine = OneEngine()
    yield engine
    engine.close()


def prompt_of(seed: object, length: int = 300) -> list[int]:
    """Return tokens that no other test asks for."""
    rng = random.Random(f"prompt {seed}")
    return [rng.randrange(10, 510) for _ in range(length)]


def whole(prompt: list[int]) -> int:
    """Return how many tokens of it are in whole blocks."""
    return len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS


def answers(
    llm: Any, prompts: list[list[int]], max_tokens: int = 8, *, salt: str | None = None, **more: Any
) -> list[tuple[list[int], int]]:
    """Ask all at once; for each the greedy tokens, and how many of the prompt were cached."""
    from vllm import SamplingParams  # noqa: PLC0415

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    salted = {"cache_salt": salt} if salt else {}
    asked = [{"prompt_token_ids": prompt, **salted} for prompt in prompts]
    outputs = llm.generate(asked, greedy, use_tqdm=False, **more)
    return [(list(one.outputs[0].token_ids), one.num_cached_tokens) for one in outputs]


def store(llm: Any, prompt: list[int]) -> list[int]:
    """Let the engine compute and store a prompt and forget it; returns its answer."""
    ((tokens, num_cached),) = answers(llm, [prompt])
    assert num_cached == 0, "it was there already: the test needs a prompt of its own"
    settle(llm)
    return tokens


def hashes_of(llm: Any, prompt: list[int], *, adapter: str = "") -> list[bytes]:
    """Return the hashes of a prompt's whole blocks, as the engine makes them."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.lora.request import LoRARequest  # noqa: PLC0415
    from vllm.v1.request import Request  # noqa: PLC0415

    core = llm.llm_engine.engine_core.engine_core
    request = Request(
        request_id="asked by a test",
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        lora_request=LoRARequest(adapter, 1, f"/adapters/{adapter}") if adapter else None,
        block_hasher=core.request_block_hasher,
    )
    return list(request.block_hashes)
