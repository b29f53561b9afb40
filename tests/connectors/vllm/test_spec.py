"""What is made for an engine of several ranks, and what vLLM makes of what they say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

import kvx
from kvx_vllm.rank_cache import config_of_rank
from kvx_vllm.settings import Settings
from kvx_vllm.spec import KvxSpec, made_for
from kvx_vllm.specs import KvxWorkerMetadata, LoadFailure


def spec_of(tmp_path: Path, **parallel: Any) -> KvxSpec:
    """Make the spec of a scheduler that sees no worker in its process."""
    of_two = {"world_size": 2, "nnodes_within_dp": 1, "distributed_executor_backend": "mp"}
    facts = SimpleNamespace(config=SimpleNamespace(parallel_config=SimpleNamespace(**of_two)))
    vars(facts.config.parallel_config).update(parallel)
    tiers = [
        {"kind": "dram", "capacity": "16MiB"},
        {"kind": "nvme", "path": str(tmp_path / "nvme"), "capacity": "64MiB"},
    ]
    config = SimpleNamespace(
        extra_config={"config": {"tiers": tiers}}, engine_id="e", groups=(),
        cache=SimpleNamespace(tokens_per_hash=32, blocks_per_chunk=1),
        parallel=SimpleNamespace(world_size=2), enable_kv_cache_events=False,
    )  # fmt: skip
    with made_for(facts):
        return KvxSpec(config)


@pytest.mark.parametrize(
    ("parallel", "why"),
    [
        ({"nnodes_within_dp": 2}, "spans 2 nodes; .* scheduler's machine"),
        ({"distributed_executor_backend": "external_launcher"}, "use mp"),
    ],
)
def test_ranks_that_cannot_be_asked_are_refused(
    tmp_path: Path, parallel: dict[str, object], why: str
) -> None:
    with pytest.raises(kvx.ConfigError, match=why):
        spec_of(tmp_path, **parallel).get_manager()


def test_ranks_are_found_without_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    manager = spec_of(tmp_path).get_manager()
    manager.shutdown()
    assert (tmp_path / "kvx" / "vllm").is_dir()


def test_each_rank_has_its_share(tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    settings = Settings.of(
        {
            "config": {
                "tiers": [
                    {"kind": "dram", "capacity": "16MiB"},
                    {"kind": "nvme", "path": str(nvme), "capacity": "64MiB"},
                ]
            }
        }
    )
    parallel = {"world_size": 2, "data_parallel_size": 1, "data_parallel_index": 0}
    of_ranks = [
        config_of_rank(settings, SimpleNamespace(rank=rank, **parallel)) for rank in range(2)
    ]
    described: list[Any] = [one.to_dict()["tiers"] for one in of_ranks]
    assert [dram["capacity"] for dram, _ in described] == ["8MiB"] * 2
    assert [disk["path"] for _, disk in described] == [
        str(nvme / f"dp0-rank{rank}") for rank in range(2)
    ]
    caches = [kvx.TieredCache.open(one) for one in of_ranks]
    for cache in caches:
        cache.close()


def output(*, is_done: bool = False, bad: tuple[int, ...] = ()) -> ModelRunnerOutput:
    """Return what a rank says after a step: whether its load of a request ended, and how."""
    failures = [LoadFailure("r", 0, [bytes(32)] * len(bad), ["corrupt"] * len(bad))] if bad else []
    said = KVConnectorOutput(
        finished_recving={"r"} if is_done else None,
        failed_recving={"r"} if bad else set(),
        invalid_block_ids=set(bad),
        kv_connector_worker_meta=(
            KvxWorkerMetadata({7: 1}, failures=failures) if is_done else None
        ),
    )
    return ModelRunnerOutput(req_ids=[], req_id_to_index={}, kv_connector_output=said)


@pytest.mark.parametrize("who_fails", [0, 1])
@pytest.mark.parametrize("is_first", [True, False])
def test_where_one_rank_fails_the_load_has_failed(who_fails: int, *, is_first: bool) -> None:
    ranks = KVOutputAggregator(2)
    failing = output(is_done=True, bad=(4, 5))
    steps = [(failing, output()), (output(), output(is_done=True))]
    if not is_first:
        steps = [(output(), output(is_done=True)), (failing, output())]
    said = []
    for of_failing, of_other in steps:
        both = [of_failing, of_other] if who_fails == 0 else [of_other, of_failing]
        whole = ranks.aggregate(both)
        assert whole is not None
        said.append(whole.kv_connector_output)
    first, last = said
    assert not first.finished_recving
    assert not first.failed_recving
    assert last.finished_recving == last.failed_recving == {"r"}
    assert first.invalid_block_ids | last.invalid_block_ids == {4, 5}
    metas = [one.kv_connector_worker_meta for one in said]
    assert [meta.completed_jobs for meta in metas] == [{7: 1}, {7: 1}]
    assert sum(len(meta.failures) for meta in metas) == 1


def test_what_ranks_say_in_one_step_is_summed() -> None:
    both = KVOutputAggregator(2).aggregate([output(is_done=True), output(is_done=True, bad=(4,))])
    assert both is not None
    said = both.kv_connector_output
    assert said.finished_recving == said.failed_recving == {"r"}
    assert said.kv_connector_worker_meta.completed_jobs == {7: 2}
    assert len(said.kv_connector_worker_meta.failures) == 1
