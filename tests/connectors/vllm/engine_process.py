"""An engine in a process of its own: answers a prompt, stores its blocks, and is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kvx_vllm.rank_cache import rank_cache_here
from tests.connectors.vllm.engine import answer, open_engine, settle

_ROOT = Path(__file__).parents[3]
_ANSWER = "answer: "
_FLUSH_S = 30.0


def answer_and_be_killed(model: Path, config: Mapping[str, object], prompt: list[int]) -> list[int]:
    """Return the tokens of an engine that was killed when its lowest tiers had all blocks."""
    question = json.dumps({"model": str(model), "config": config, "prompt": prompt})
    with subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main()", question],
        cwd=_ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            answers = (line for line in process.stdout if line.startswith(_ANSWER))
            tokens: list[int] = json.loads(next(answers).removeprefix(_ANSWER))
        finally:
            process.send_signal(signal.SIGKILL)
    return tokens


def main() -> None:
    """Answer, and wait to be killed."""
    question = json.loads(sys.argv[1])
    with open_engine(Path(question["model"]), question["config"]) as llm:
        tokens, _ = answer(llm, question["prompt"])
        settle(llm)
        rank = rank_cache_here(llm.llm_engine.vllm_config.kv_transfer_config.engine_id, 0)
        assert rank is not None
        assert rank.cache.flush(_FLUSH_S)
        sys.stdout.write(f"{_ANSWER}{json.dumps(tokens)}\n")
        sys.stdout.flush()
        sys.stdin.read()
