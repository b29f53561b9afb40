"""One process of the demo: runs every turn in the ways asked for, reports each as a JSON line.

The parent starts it, reads its reports, and may kill it at any time: that is the point.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import kvx
from kvx_server.demo.conversation import Conversation, conversations, prompt
from kvx_server.demo.prefix_cache import KvxPrefixCache, Scrambling
from kvx_server.engine.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODEL = Path(__file__).parent.parent / "engine" / "tiny_llama"
BLOCK_TOKENS = 64
NUM_BLOCKS = 96
ANSWER_TOKENS = 32
SCRAMBLED = "scrambled"
NUM_CONVERSATIONS = 2
NUM_TURNS = 4
_REWARM_WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Report:
    """One turn, run in one way.

    Attributes:
        way: Where the KV came from: cold, first, dram, nvme, restart, damaged or scrambled.
        title: Of the conversation.
        turn: Its number, from 1.
        prompt_tokens: Length of the prompt.
        reused: Tokens reused by tier.
        ttft_s: Time to the first token.
        tokens: What was generated.
        text: The same, readable.
        reason: Why not more was reused.
    """

    way: str
    title: str
    turn: int
    prompt_tokens: int
    reused: dict[str, int]
    ttft_s: float
    tokens: tuple[int, ...]
    text: str
    reason: str


def open_cache(directory: str, *, rewarm: bool) -> kvx.TieredCache:
    """Open the demo's cache: a little DRAM over a little NVMe."""
    return kvx.TieredCache.open(
        {
            "tiers": [
                {"kind": "dram", "capacity": "64MiB", "prefault": "eager"},
                {
                    "kind": "nvme",
                    "path": directory,
                    "capacity": "256MiB",
                    "durability": "batch",
                    "rewarm": rewarm,
                },
            ]
        }
    )


def connect(engine: Engine, cache: kvx.TieredCache) -> KvxPrefixCache:
    """Open the engine's namespace in a cache."""
    space = cache.namespace(
        model="tiny-llama",
        dtype="float32",
        block_bytes=engine.block_bytes_view.shape[1],
        block_tokens=BLOCK_TOKENS,
        hash_scheme="kvx-sha256",
    )
    return KvxPrefixCache(engine, space)


class Runner:
    """Runs all turns of all conversations in one way."""

    def __init__(self) -> None:
        """Load the model."""
        self.engine = Engine.load(MODEL, NUM_BLOCKS, BLOCK_TOKENS)
        self._answers: dict[str, list[str]] = {}

    def run(self, way: str, prefix_cache: KvxPrefixCache | Scrambling | None) -> Iterator[Report]:
        """Yield a report for every turn; the user replies to the answers of the first way."""
        for conversation in conversations(NUM_CONVERSATIONS, NUM_TURNS):
            answers = self._answers.setdefault(conversation.title, [])
            for turn in range(NUM_TURNS):
                report = self._turn(way, conversation, turn, answers, prefix_cache)
                if len(answers) == turn:
                    answers.append(report.text)
                yield report

    def _turn(
        self,
        way: str,
        conversation: Conversation,
        turn: int,
        answers: Sequence[str],
        prefix_cache: KvxPrefixCache | Scrambling | None,
    ) -> Report:
        tokens = self.engine.tokenizer.encode(prompt(conversation, turn, answers))
        made = self.engine.generate(tokens, ANSWER_TOKENS, prefix_cache=prefix_cache)
        return Report(
            way=way,
            title=conversation.title,
            turn=turn + 1,
            prompt_tokens=made.num_prompt_tokens,
            reused={} if prefix_cache is None else prefix_cache.tokens_by_tier,
            ttft_s=made.ttft_s,
            tokens=made.tokens,
            text=self.engine.tokenizer.decode(list(made.tokens)),
            reason="" if prefix_cache is None else prefix_cache.last_reason.name.lower(),
        )


def main() -> None:
    """Run `child.py first DIR`, `child.py restart DIR` or `child.py damaged DIR`."""
    stage, directory = sys.argv[1:3]
    runner = Runner()
    _say(runner.run("cold", None))
    if stage == "first":
        with open_cache(directory, rewarm=False) as cache:
            prefix_cache = connect(runner.engine, cache)
            _say(runner.run("first", prefix_cache))
            _say(runner.run("dram", prefix_cache))
        with open_cache(directory, rewarm=False) as cache:
            _say(runner.run("nvme", connect(runner.engine, cache)))
            cache.flush()
            _emit({"stage": "ready to be killed"})
            # Until the parent's SIGKILL; the bound only keeps a lost child from staying forever.
            time.sleep(60.0)
    else:
        with open_cache(directory, rewarm=stage == "restart") as cache:
            _wait_for_rewarm(cache)
            prefix_cache = connect(runner.engine, cache)
            _say(runner.run(stage, prefix_cache))
            if stage == "damaged":
                *_, last = runner.run(SCRAMBLED, Scrambling(prefix_cache, runner.engine))
                _say(iter([last]))
    _emit({"stage": "done"})


def _wait_for_rewarm(cache: kvx.TieredCache) -> None:
    end = time.monotonic() + _REWARM_WAIT_S
    while "rewarm" in cache.stats() and not cache.stats()["rewarm"]["is_done"]:
        if time.monotonic() > end:
            return
        time.sleep(0.01)


def _say(reports: Iterator[Report]) -> None:
    for report in reports:
        _emit(asdict(report))


def _emit(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
