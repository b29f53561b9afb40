"""Prefill on one real server, decode on another: the tokens are those of one engine alone."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kvx
from kvx_vllm.pd.reference import FIELD, GroupBlocks, Outcome, Reference
from tests.connectors.vllm.engine import BLOCK_TOKENS, make_llama
from tests.connectors.vllm.server import (
    Server,
    environment,
    free_port,
    give_tokenizer,
    open_server,
)
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KEY = "a key for the tests of two servers"
TOKENS = 300
WHOLE = TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
_IN_VAIN = (Outcome.TIMED_OUT, Outcome.UNREACHABLE, Outcome.LOAD_FAILED)
# Seconds that the decode engine waits for the producer's word, and for a load, with some to spare.
WAIT_S, LOAD_S, SPARE_S = 1.0, 2.0, 10.0


def prompt_of(number: int, tokens: int = TOKENS) -> list[int]:
    """Return a prompt that no other number begins alike."""
    return [3 + (number * 131 + place * (7 + number % 5)) % 500 for place in range(tokens)]


def config_of(name: str, port: int) -> dict[str, object]:
    peer = {"kind": "peer", "name": name, "listen": [f"tcp://127.0.0.1:{port}"], "key": KEY}
    return {"tiers": [{"kind": "dram", "capacity": "1GiB", "prefault": "never"}, peer]}


@dataclass
class Pair:
    """Two servers of the same model.

    Attributes:
        prefill: Computes prompts.
        decode: Answers.
        way: How bytes go between them, `shm` or `tcp`.
        port: That the agent of the first one listens on.
        start_prefill: Starts it once more.
    """

    prefill: Server
    decode: Server
    way: str
    port: int
    start_prefill: Callable[[], Server]

    def reference(self, prompt: list[int]) -> dict[str, Any]:
        """Prefill a prompt; returns what the response says."""
        found = self.prefill.complete(prompt, 1, kv_transfer_params=PREFILL)["kv_transfer_params"]
        assert isinstance(found, dict)
        assert FIELD in found
        return found

    def decoded(self, prompt: list[int], params: object) -> tuple[list[int], float, float]:
        """Return the tokens, how many of the prompt's came from outside, and the seconds."""
        before = self.decode.metric("vllm:external_prefix_cache_hits_total")
        began_s = time.monotonic()
        answer = self.decode.complete(prompt, 8, kv_transfer_params=params)
        elapsed_s = time.monotonic() - began_s
        after = self.decode.metric("vllm:external_prefix_cache_hits_total")
        return answer["choices"][0]["token_ids"], after - before, elapsed_s

    def alone(self, prompt: list[int]) -> list[int]:
        """Return the tokens of an engine that computes everything itself."""
        self.decode.post("/reset_prefix_cache?reset_connector=false")
        answer = self.decode.complete(prompt, 8, cache_salt="alone")
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def outcomes(self, outcome: Outcome) -> float:
        """Return how many references ended so."""
        return self.decode.metric("vllm:kvx_pd_references_total", f'outcome="{outcome}"')

    def all_outcomes(self) -> float:
        """Return how many references ended somehow."""
        return self.decode.metric("vllm:kvx_pd_references_total")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model whose KV is large for its size, so that handing it over takes a while."""
    path = tmp_path_factory.mktemp("models") / "wide-llama"
    make_llama(path, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    give_tokenizer(path)
    return path


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    """Start two servers, one after the other."""
    logs, port = tmp_path_factory.mktemp("logs"), free_port()
    extra = {"pd_wait_s": WAIT_S, "load_deadline_s": LOAD_S, "pd_lease_s": 600.0}
    room = ("--kv-cache-memory-bytes", str(256 << 20))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        runtime = tmp_path_factory.mktemp("run")
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))

        def start_prefill() -> Server:
            server = stack.enter_context(
                open_server(model, config_of("p", port), logs / "p", *room, extra=extra)
            )
            for one in runtime.rglob("*.sock") if request.param == "tcp" else ():
                one.unlink()  # without the file that they would meet on, only TCP is left
            return server

        prefill = start_prefill()
        decode = stack.enter_context(
            open_server(model, config_of("d", 0), logs / "d", *room, extra=extra)
        )
        yield Pair(prefill, decode, request.param, port, start_prefill)


def is_connected_by_tcp(port: int) -> bool:
    """Return whether somebody of this host has a connection to a port."""
    rows = [one.split() for one in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(int(row[2].rpartition(":")[2], 16) == port and row[3] == "01" for row in rows)


def test_two_servers_answer_as_one(pair: Pair) -> None:
    for number in range(3):
        prompt = prompt_of(number)
        tokens, num_external, _ = pair.decoded(prompt, pair.reference(prompt))
        assert num_external == WHOLE
        assert tokens == pair.alone(prompt)
    assert is_connected_by_tcp(pair.port) is (pair.way == "tcp")
    assert pair.outcomes(Outcome.USED) == 3
    assert pair.decode.metric("vllm:kvx_hit_tokens_total", 'tier="peer"') == 3 * WHOLE


def test_a_prompt_that_ends_with_a_block(pair: Pair) -> None:
    prompt = prompt_of(10, 4 * BLOCK_TOKENS)
    tokens, num_external, _ = pair.decoded(prompt, pair.reference(prompt))
    assert 3 * BLOCK_TOKENS <= num_external <= 4 * BLOCK_TOKENS
    assert tokens == pair.alone(prompt)


def test_a_prompt_shorter_than_a_block(pair: Pair) -> None:
    prompt = prompt_of(11, 5)
    tokens, num_external, _ = pair.decoded(prompt, pair.reference(prompt))
    assert num_external == 0
    assert tokens == pair.alone(prompt)


def test_what_the_prefill_engine_had_cached_is_handed_over_as_well(pair: Pair) -> None:
    prompt = prompt_of(12)
    pair.prefill.complete(prompt, 1)
    tokens, num_external, _ = pair.decoded(prompt, pair.reference(prompt))
    assert num_external == WHOLE
    assert tokens == pair.alone(prompt)


def changed(params: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Return a reference with other facts, signed by somebody who has the key."""
    reference = Reference.of_params(params)
    fields = {name: getattr(reference, name) for name in Reference.__struct_fields__}
    return Reference(**{**fields, **facts}).signed(kvx.SharedKey(KEY)).to_params()


def forged(params: dict[str, Any]) -> dict[str, Any]:
    return {**params, FIELD: {**params[FIELD], "agent": "somebody"}}


def longer(params: dict[str, Any]) -> dict[str, Any]:
    (group,) = Reference.of_params(params).groups
    return changed(params, groups=[GroupBlocks(group.namespace, 99, group.last_hash)])


def of_other_prompt(params: dict[str, Any]) -> dict[str, Any]:
    (group,) = Reference.of_params(params).groups
    return changed(params, groups=[GroupBlocks(group.namespace, group.num_blocks, b"h" * 32)])


CASES: dict[Outcome, Callable[[dict[str, Any]], dict[str, Any]]] = {
    Outcome.UNKNOWN: lambda params: changed(params, id=b"i" * 16),
    Outcome.OUT_OF_RANGE: longer,
    Outcome.EXPIRED: lambda params: changed(params, expires_at_ms=1_000_000),
    Outcome.FORGED: forged,
    Outcome.OTHER_PROMPT: of_other_prompt,
    Outcome.MALFORMED: lambda params: {**params, FIELD: {"id": "x"}},
}


@pytest.mark.parametrize("outcome", CASES)
def test_a_reference_that_is_not_right(pair: Pair, outcome: Outcome) -> None:
    prompt = prompt_of(20 + list(CASES).index(outcome))
    params = CASES[outcome](pair.reference(prompt))
    before = pair.outcomes(outcome)
    tokens, _, elapsed_s = pair.decoded(prompt, params)
    assert pair.outcomes(outcome) == before + 1
    assert tokens == pair.alone(prompt)
    assert elapsed_s < WAIT_S + LOAD_S + SPARE_S


def test_a_reference_is_good_once(pair: Pair) -> None:
    prompt = prompt_of(30)
    params = pair.reference(prompt)
    first, _, _ = pair.decoded(prompt, params)
    before = pair.outcomes(Outcome.CONSUMED)
    again, _, _ = pair.decoded(prompt, params)
    assert first == again == pair.alone(prompt)
    assert pair.outcomes(Outcome.CONSUMED) == before + 1


_PROXY = """
import argparse, sys
from kvx_vllm.pd import command
parser = argparse.ArgumentParser()
command.add_arguments(parser)
sys.exit(command.run(parser.parse_args()))
"""


@contextlib.contextmanager
def proxy_before(pair: Pair, log: Path) -> Iterator[str]:
    """Run `kvx pd-proxy`; yields its URL."""
    command = [
        sys.executable, "-c", _PROXY, "--prefill", pair.prefill.url, "--decode", pair.decode.url,
        "--listen", "127.0.0.1:0",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, env=environment())
    try:
        assert eventually(lambda: "listening on http" in log.read_text(), 30)
        (line,) = [one for one in log.read_text().splitlines() if "listening on http" in one]
        yield line.rpartition(" ")[2]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_clients_of_the_proxy(pair: Pair, tmp_path: Path) -> None:
    with proxy_before(pair, tmp_path / "log") as url:
        used = pair.outcomes(Outcome.USED)
        body = {"model": "tiny", "prompt": prompt_of(40), "max_tokens": 8, "temperature": 0}
        more = {"ignore_eos": True, "return_token_ids": True}
        tokens = told(url + "/v1/completions", {**body, **more})
        assert json.loads(tokens)["choices"][0]["token_ids"] == pair.alone(prompt_of(40))
        streamed = told(url + "/v1/completions", {**body, "prompt": prompt_of(41), "stream": True})
        assert streamed.endswith("data: [DONE]\n\n")
        chat = {
            "model": "tiny", "max_tokens": 8, "temperature": 0,
            "messages": [{"role": "user", "content": "what the quick brown fox says " * 20}],
        }  # fmt: skip
        answer = json.loads(told(url + "/v1/chat/completions", chat))
        alone = pair.decode.post("/v1/chat/completions", {**chat, "cache_salt": "alone"})
        assert answer["choices"][0]["message"] == alone["choices"][0]["message"]
        assert pair.outcomes(Outcome.USED) == used + 3


def told(url: str, body: object) -> str:
    request = urllib.request.Request(  # noqa: S310 - our own server
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        text: str = response.read().decode()
    return text


def hit_meanwhile(
    pair: Pair, prompt: list[int], number: signal.Signals, delay_s: float
) -> list[int]:
    """Decode a prompt, and send the prefill engine a signal meanwhile; returns the tokens."""
    params = pair.reference(prompt)
    timer = threading.Timer(delay_s, pair.prefill.signal, [number])
    timer.start()
    tokens, _, elapsed_s = pair.decoded(prompt, params)
    timer.join()
    assert elapsed_s < WAIT_S + LOAD_S + SPARE_S
    return tokens


def test_a_prefill_engine_that_freezes(pair: Pair) -> None:
    """At any time, from before it is asked until after it has handed everything over."""
    delays_s = (0.0, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.06, 0.1)
    before = pair.all_outcomes()
    failed = sum(map(pair.outcomes, _IN_VAIN))
    for turn, delay_s in enumerate(delays_s):
        prompt = prompt_of(50 + turn, 2000)
        try:
            tokens = hit_meanwhile(pair, prompt, signal.SIGSTOP, delay_s)
        finally:
            pair.prefill.signal(signal.SIGCONT)
        assert tokens == pair.alone(prompt)
    assert pair.all_outcomes() == before + len(delays_s)
    assert sum(map(pair.outcomes, _IN_VAIN)) > failed


def test_a_prefill_engine_that_is_killed_and_comes_back(pair: Pair) -> None:
    former = prompt_of(70)
    params = pair.reference(former)
    prompt = prompt_of(71, 2000)
    tokens = hit_meanwhile(pair, prompt, signal.SIGKILL, 0.02)
    assert tokens == pair.alone(prompt)
    pair.prefill = pair.start_prefill()
    again = prompt_of(72)
    used, stale = pair.outcomes(Outcome.USED), pair.outcomes(Outcome.STALE)
    assert pair.decoded(again, pair.reference(again))[0] == pair.alone(again)
    assert pair.outcomes(Outcome.USED) == used + 1
    # What its former life gave out is worth nothing.
    assert pair.decoded(former, params)[0] == pair.alone(former)
    assert pair.outcomes(Outcome.STALE) == stale + 1


def test_a_stale_reference(pair: Pair) -> None:
    prompt = prompt_of(31)
    params = pair.reference(prompt)
    # What was stored is gone, and its room reused; another engine's blocks are not found from now
    # on, since whoever resets has mostly changed the weights.
    pair.prefill.post("/reset_prefix_cache?reset_external=true")
    for number in range(32, 36):
        pair.prefill.complete(prompt_of(number), 1)
    before = pair.outcomes(Outcome.STALE)
    tokens, _, _ = pair.decoded(prompt, params)
    assert tokens == pair.alone(prompt)
    assert pair.outcomes(Outcome.STALE) == before + 1
