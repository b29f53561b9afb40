"""vLLM's real API server in a process of its own, on CPU, with the connector in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.connectors.vllm.engine import BLOCK_TOKENS, transfer_config

ROOT = Path(__file__).parents[3]
_READY_S = 240.0
_REPLY_S = 60.0
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def give_tokenizer(model: Path) -> None:
    """Put a tokenizer of bytes beside the weights: an API server wants one."""
    import tokenizers  # noqa: PLC0415 - not everybody who collects this has it
    import transformers  # noqa: PLC0415

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(["user assistant"], trainer)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    kind: Any = transformers.PreTrainedTokenizerFast
    fast = kind(tokenizer_object=made, **named)
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(model)


class Server:
    """A running API server.

    Attributes:
        url: Where it listens.
        log: What it printed.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self._process = process
        self.url = url
        self.log = log

    def complete(self, prompt: object, max_tokens: int = 8, **more: object) -> dict[str, Any]:
        """Return the answer to a prompt, greedy, with its tokens."""
        body = {
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **more,
        }  # fmt: skip
        return self.post("/v1/completions", body)

    def post(self, path: str, body: Mapping[str, object] = {}) -> dict[str, Any]:
        """Return what the server says."""
        request = urllib.request.Request(  # noqa: S310 - our own server
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_REPLY_S) as response:  # noqa: S310
            text = response.read()
        found: dict[str, Any] = json.loads(text) if text else {}
        return found

    def metric(self, name: str, labels: str = "") -> float:
        """Return the sum of a metric's samples whose labels contain a text."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=_REPLY_S) as response:  # noqa: S310
            lines = response.read().decode().splitlines()
        found = [one for one in lines if one.startswith((name + "{", name + " ")) and labels in one]
        return sum(float(one.rpartition(" ")[2]) for one in found)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and to its engine."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._process.wait()


def environment() -> dict[str, str]:
    """Return what processes of a test find in their environment."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'connectors'}",
        # On CPUs vLLM gives a rank a process of its own all the same, but for this.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_SERVER_DEV_MODE": "1",
    }


def free_port() -> int:
    """Return a port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def open_server(
    model: Path, kvx_config: object, log: Path, *options: str,
    extra: Mapping[str, object] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Start a server and wait until it serves.

    Args:
        model: Of the weights, with a tokenizer.
        kvx_config: The tiers; None for an engine without the connector.
        log: File for what it prints.
        options: More of its command line.
        extra: More of `kv_connector_extra_config`.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096",
        "--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "4",
        "--kv-cache-memory-bytes", str(64 << 20), "--enable-prompt-tokens-details",
        # As on GPUs: a single rank lives in the process of its scheduler.
        "--distributed-executor-backend", "uni", *options,
    ]  # fmt: skip
    if kvx_config is not None:
        transfer = transfer_config(kvx_config, extra)
        command += ["--kv-transfer-config", json.dumps(transfer)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(),
            start_new_session=True,
        )  # fmt: skip
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_ready(server, process)
        yield server
    finally:
        server.kill()


def _wait_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    tail = server.log.read_text(errors="replace")[-4000:]
    raise AssertionError(f"the server did not begin to serve within {_READY_S} s:\n{tail}")
