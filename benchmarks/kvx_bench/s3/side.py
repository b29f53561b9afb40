"""The process of one client: `Child.of_module` starts it, and its first request says which.

What has been moved is looked at here, block by block, outside of what is timed.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from kvx_bench.answering import answer_requests
from kvx_bench.copying import prefaulted
from kvx_bench.row import timed
from kvx_bench.s3.clients.client import Client, Place, open_client
from kvx_bench.s3.clients.kvx_client import KvxClient
from kvx_bench.s3.serving import ask_far, keep, serve
from kvx_bench.transfer.pattern import CLEARED, Pattern

_LOOK_S = 0.0002


class Side:
    """A client with memory for one prompt."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Open it.

        Raises:
            ImportError: What it uses is not installed.
        """
        self._place = Place(**request["place"])
        self._client: Client = open_client(request["client"], self._place)
        memory = prefaulted(request["num_blocks"] * self._place.block_bytes, fill=0)
        self._blocks = memory.reshape(-1, self._place.block_bytes)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        match request["do"]:
            case "describe":
                return {"description": self._client.description}
            case "put":
                return self._put(request["prompt"])
            case "get":
                return self._get(request["prompt"])
            case "first":
                return self._first(request["prompt"])
            case "singles":
                return {"times": [self._single(request["prompt"]) for _ in range(request["count"])]}
        return self._of_a_cache(request)

    def close(self) -> None:
        """Close it."""
        self._client.close()

    def _of_a_cache(self, request: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(self._client, KvxClient), "nobody else keeps anything"
        match request["do"]:
            case "keep":
                self._pattern(request["prompt"]).fill(self._blocks)
                keep(self._client, request["prompt"], self._blocks)
                return {}
            case "serve":
                answer = serve(self._client, request["prompt"], self._blocks, request["seconds"])
                self._look(request["prompt"])
                return answer
            case "ask-far":
                return ask_far(
                    self._client, request["prompt"], request["count"], request["deadline_s"]
                )
        return {"error": f"a client cannot {request['do']}"}

    def _put(self, prompt: int) -> dict[str, Any]:
        self._pattern(prompt).fill(self._blocks)
        self._client.prepare()
        sample = timed(lambda: self._client.put(prompt, self._blocks))
        return {"wall_s": sample.wall_s, "cpu_s": sample.cpu_s}

    def _get(self, prompt: int) -> dict[str, Any]:
        self._blocks[:] = 0
        self._client.prepare()
        sample = timed(lambda: self._client.get(prompt, self._blocks))
        self._look(prompt)
        return {"wall_s": sample.wall_s, "cpu_s": sample.cpu_s}

    def _first(self, prompt: int) -> dict[str, Any]:
        """Bring a prompt, and watch when the last word of its first block is there."""
        expected = self._pattern(prompt).block(0)
        word, awaited = self._blocks[0, -8:].view("u8"), expected[-8:].view("u8")[0]
        self._blocks[:] = 0
        self._client.prepare()
        bringing = threading.Thread(target=self._client.get, args=(prompt, self._blocks))
        began = time.perf_counter()
        bringing.start()
        while word[0] != awaited and bringing.is_alive():
            time.sleep(_LOOK_S)  # memory does not tell; so short that it does not show
        first_s = time.perf_counter() - began
        bringing.join()
        whole_s = time.perf_counter() - began
        self._look(prompt)
        return {"first_s": first_s, "whole_s": whole_s}

    def _single(self, prompt: int) -> float:
        """Return the seconds of bringing one block."""
        self._client.prepare()
        return timed(lambda: self._client.get(prompt, self._blocks[:1])).wall_s

    def _look(self, prompt: int) -> None:
        found = self._pattern(prompt).first_difference(self._blocks)
        if found is not None:
            raise ValueError(f"prompt {prompt}: {found}")

    def _pattern(self, prompt: int) -> Pattern:
        assert prompt != CLEARED, "no prompt has this number"
        return Pattern(self._place.block_bytes, prompt)


if __name__ == "__main__":
    answer_requests(Side)
