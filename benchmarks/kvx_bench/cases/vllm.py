"""vLLM on CPU: the first token with a hit beside without, and what kvx costs where nothing hits."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from kvx_bench.row import Row, Sample, median, percentiles_us
from kvx_bench.transfer.child import Child
from kvx_bench.transfer.contest import hold

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvx_bench.case import Options

_PATIENCE_S = 300.0
_BLOCK_TOKENS = 32
_HITS = {
    "dram": "kvx, all of the prompt in DRAM",
    "nvme": "kvx, DRAM smaller than the prompt: read from the disk",
    "example": "vLLM's ExampleConnector to files; its offloading connector and tiers refuse CPUs",
}
_HALVES = {
    "scheduler": "calls of the connector, vLLM's own part of it included",
    "worker": "calls of kvx's worker, what begins and ends the copies included",
}
# vLLM reads these when it is imported; the engine is in the process that looks at it.
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
_STANDING = 1
_fresh = itertools.count(1000)


class VllmCase:
    """A model of 33 million parameters with random weights, float32, prompts of 4096 tokens."""

    name = "vllm"
    description = "vLLM's first token with and without a hit, and the connector's cost"

    def why_not(self, options: Options) -> str:
        """Say when no Python with vLLM was named."""
        if options.vllm_python is None:
            return "no --vllm-python is named; `make test-vllm` makes .venv-vllm/bin/python"
        found = subprocess.run(
            [options.vllm_python, "-c", "import importlib.util as u; u.find_spec('vllm').name"],
            check=False, capture_output=True,
        )  # fmt: skip
        return "" if found.returncode == 0 else f"{options.vllm_python} has no vLLM"

    def run(self, options: Options) -> Iterator[Row]:
        """First tokens, then throughput where nothing hits, then what calls of kvx cost."""
        num_tokens, rounds = (1024, 2) if options.is_quick else (4096, 5)
        with contextlib.ExitStack() as made:
            engines = {
                how: made.enter_context(Engine(how, options, num_tokens))
                for how in ("none", *_HITS)
            }
            yield from _first_tokens(engines, num_tokens, rounds)
            yield from _overhead(engines, num_tokens // 2, rounds)
            yield from _costs(engines["dram"], num_tokens)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, how: str, options: Options, num_tokens: int) -> None:
        """Start it; `how` is one of the ways of `kvx_bench.vllm.side`."""
        assert options.vllm_python is not None, "why_not() said so"
        directory = options.path / how
        directory.mkdir()
        self._child = Child.of_folders(
            "kvx_bench.vllm.side", "kvx_vllm", options.vllm_python, _SETTINGS
        )
        self._child.socket.settimeout(_PATIENCE_S)
        try:
            self.ask(
                "open", how=how, model=str(_model(options.path)), directory=str(directory),
                max_tokens=num_tokens + 2 * _BLOCK_TOKENS,
            )  # fmt: skip
        except BaseException:
            self._child.close()
            raise

    def __enter__(self) -> Self:
        """Nothing but the engine."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self._child.close()

    def ask(self, what: str, **request: object) -> dict[str, Any]:
        """Have it do something."""
        return self._child.ask(do=what, **request)


def _model(path: Path) -> Path:
    return path / "model"


def _first_tokens(engines: dict[str, Engine], num_tokens: int, rounds: int) -> Iterator[Row]:
    """Yield the time to the first token of a prompt that is stored, beside computing it."""
    whole = num_tokens // _BLOCK_TOKENS * _BLOCK_TOKENS
    asked = {"prompt": _STANDING, "num_tokens": num_tokens + _BLOCK_TOKENS // 2}
    for engine in engines.values():
        engine.ask("first", **asked)  # stores it
    answers = {how: [engine.ask("first", **asked)] for how, engine in engines.items()}
    for _ in range(rounds):
        for how, engine in engines.items():
            answers[how].append(engine.ask("first", **asked))
    computed = [one["wall_s"] for one in answers["none"][1:]]
    token = answers["none"][0]["token"]
    for how, of_engine in answers.items():
        told = of_engine[1:]
        seconds = [one["wall_s"] for one in told]
        wrong = sum(one["token"] != token for one in of_engine)
        cached = min(one["num_cached"] for one in told)
        p50_us, p99_us = percentiles_us(seconds)
        note = "nothing cached" if how == "none" else _HITS[how]
        note += f"; {cached} of {whole} tokens cached"
        note += f", {wrong} WRONG TOKENS" if wrong else ", the same token"
        yield Row(
            f"vllm.ttft.{num_tokens}.{'recompute' if how == 'none' else how}",
            p50_us=p50_us, p99_us=p99_us,
            ratio=median(a / b for a, b in zip(computed, seconds, strict=True)),
            limit_name="times sooner than recompute", note=note,
        )  # fmt: skip


def _overhead(engines: dict[str, Engine], num_tokens: int, rounds: int) -> Iterator[Row]:
    """Yield throughput of prompts that nobody has seen, with the connector beside without."""

    def compute(engine: Engine) -> Sample:
        prompts = [next(_fresh) for _ in range(4)]
        found = engine.ask("many", prompts=prompts, num_tokens=num_tokens, max_tokens=16)
        return Sample(found["wall_s"], found["cpu_s"])

    names = {"none": "vLLM alone", "dram": "kvx to DRAM", "nvme": "kvx to DRAM and NVMe"}
    contest = hold(
        {how: partial(compute, engines[how]) for how in names},
        4 * num_tokens, rounds=rounds,
    )  # fmt: skip
    alone = contest.samples["none"]
    for how in ("dram", "nvme"):
        walls = contest.samples[how]
        yield Row(
            f"vllm.overhead.{how}",
            per_s=4 * num_tokens / median(one.wall_s for one in walls),
            limit=4 * num_tokens / median(one.wall_s for one in alone),
            ratio=contest.ratio(how, "none"),
            limit_name="vLLM alone",
            note=f"{4 * num_tokens / median(one.wall_s for one in walls):.0f} tokens a second of "
            f"prompts that nobody has seen, {names[how]}; CPU "
            f"{median(a.cpu_s / b.cpu_s for a, b in zip(walls, alone, strict=True)):.3f} x",
        )


def _costs(engine: Engine, num_tokens: int) -> Iterator[Row]:
    """Yield what calls of kvx cost the scheduler and the worker, for each block."""
    engine.ask("costs")
    prompts = [next(_fresh) for _ in range(2)]
    for prompt in prompts:
        engine.ask("first", prompt=prompt, num_tokens=num_tokens)
    stored = engine.ask("costs")
    for prompt in prompts:
        engine.ask("first", prompt=prompt, num_tokens=num_tokens)
    loaded = engine.ask("costs")
    for verb, found in (("stored", stored), ("loaded", loaded)):
        for who in ("scheduler", "worker"):
            count = found[verb]
            cost_us = found["spent"][who] / max(1, count) * 1e6
            yield Row(
                f"vllm.cost.{who}.{verb}", p50_us=cost_us,
                note=f"CPU us a block that is {verb}, of {count}, in {_HALVES[who]}",
            )  # fmt: skip
