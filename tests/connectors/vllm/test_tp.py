"""Workers in processes of their own: their scheduler asks all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import kvx
from kvx_vllm.ranks import RanksElsewhere
from tests.connectors.vllm.engine import BLOCK_TOKENS, answer, open_engine, settle

NUM_BLOCKS = 9
WHOLE = NUM_BLOCKS * BLOCK_TOKENS


def prompt(number: int) -> list[int]:
    """Return a prompt that shares no block with others, and ends within a block."""
    return [3 + number, *(10 + place * 7 % 500 for place in range(WHOLE + 11))]


@dataclass
class TwoRanks:
    """An engine of two ranks whose blocks go through DRAM to NVMe.

    Attributes:
        llm: vLLM's.
        nvme: The directory of the ranks' files.
        located: What its scheduler was told of blocks since it was last cleared.
        num_pushed: How many prompts pushed others out so far: blocks that are held push nothing.
    """

    llm: Any
    nvme: Path
    located: list[kvx.Location] = field(default_factory=list)
    num_pushed: int = 0

    def tiers(self) -> list[int]:
        """Return where the last prompt was found."""
        return self.located[-1].tiers.tolist()

    def push_out(self) -> None:
        """Answer other prompts until neither the engine's blocks nor DRAM have what was before."""
        for number in range(self.num_pushed, self.num_pushed + 20):
            answer(self.llm, prompt(100 + number), max_tokens=1)
        self.num_pushed += 20
        settle(self.llm)


@contextlib.contextmanager
def open_ranks(model: Path, directory: Path, **options: object) -> Iterator[TwoRanks]:
    """Open an engine whose workers are processes; they and their sockets are gone at the end."""
    nvme, runtime = directory / "nvme", directory / "run"
    runtime.mkdir()
    tiers = [
        {"kind": "dram", "capacity": "2MiB"},
        {
            "kind": "nvme", "path": str(nvme), "capacity": "128MiB",
            "durability": "none", "rewarm": False,
        },
    ]  # fmt: skip
    others = set(multiprocessing.active_children())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        options = {"max_model_len": 512, "num_gpu_blocks_override": 24, **options}
        with open_engine(model, {"tiers": tiers}, **options) as llm:
            engine = TwoRanks(llm, nvme)
            locate = RanksElsewhere.locate

            def spied(self: RanksElsewhere, *question: Any) -> kvx.Location | None:
                location = locate(self, *question)
                engine.located.extend([] if location is None else [location])
                return location

            patch.setattr(RanksElsewhere, "locate", spied)
            workers = set(multiprocessing.active_children()) - others
            assert workers
            assert any(runtime.rglob("*.sock"))
            yield engine
        assert not any(one.is_alive() for one in workers)
        assert not any(runtime.rglob("*.sock"))


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    directory = tmp_path_factory.mktemp("ranks")
    with open_ranks(tiny_llama, directory, tensor_parallel_size=2) as engine:
        yield engine


def test_what_all_ranks_hold_is_loaded(two_ranks: TwoRanks) -> None:
    computed, num_cached = answer(two_ranks.llm, prompt(0))
    assert num_cached == 0
    settle(two_ranks.llm)
    assert answer(two_ranks.llm, prompt(0)) == (computed, WHOLE)
    assert two_ranks.tiers() == [kvx.TierKind.DRAM] * NUM_BLOCKS


def test_what_was_pushed_out_is_loaded_from_nvme(two_ranks: TwoRanks) -> None:
    computed, _ = answer(two_ranks.llm, prompt(1))
    two_ranks.push_out()
    assert answer(two_ranks.llm, prompt(1)) == (computed, WHOLE)
    assert two_ranks.tiers() == [kvx.TierKind.NVME] * NUM_BLOCKS


def test_where_one_rank_fails_all_compute(two_ranks: TwoRanks) -> None:
    computed, _ = answer(two_ranks.llm, prompt(2))
    two_ranks.push_out()
    damage(two_ranks.nvme / "dp0-rank1")
    two_ranks.located.clear()
    assert answer(two_ranks.llm, prompt(2)) == (computed, 0)
    assert two_ranks.located[0].tiers.tolist() == [kvx.TierKind.NVME] * NUM_BLOCKS
    settle(two_ranks.llm)
    answer(two_ranks.llm, prompt(2))
    settle(two_ranks.llm)
    # The rank that had lost it has it again.
    assert answer(two_ranks.llm, prompt(2)) == (computed, WHOLE)


def test_a_reset_reaches_all_ranks(two_ranks: TwoRanks) -> None:
    computed, _ = answer(two_ranks.llm, prompt(3))
    settle(two_ranks.llm)
    assert two_ranks.llm.reset_prefix_cache(reset_connector=True)
    two_ranks.located.clear()
    assert answer(two_ranks.llm, prompt(3)) == (computed, 0)
    assert not two_ranks.located[0].tiers.any()
    settle(two_ranks.llm)
    assert answer(two_ranks.llm, prompt(3)) == (computed, WHOLE)


@pytest.mark.slow
def test_one_worker_elsewhere(tiny_llama: Path, tmp_path: Path) -> None:
    with open_ranks(tiny_llama, tmp_path, distributed_executor_backend="mp") as engine:
        computed, _ = answer(engine.llm, prompt(0))
        settle(engine.llm)
        assert answer(engine.llm, prompt(0)) == (computed, WHOLE)


def damage(directory: Path) -> None:
    """Flip a bit in every 4 KiB that a rank has on disk, but for the first of each file."""
    for path in directory.glob("extent-*.kvx"):
        with path.open("r+b") as file:
            for begin in range(4096, path.stat().st_size, 4096):
                file.seek(begin + 77)
                (byte,) = file.read(1)
                file.seek(begin + 77)
                file.write(bytes([byte ^ 4]))
