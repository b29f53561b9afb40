"""`kvx pd-proxy` before engines that are played: who is asked for what, and what goes wrong."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer

import kvx
from kvx_vllm.pd import command, proxy
from kvx_vllm.pd.engines import Engine, choose
from kvx_vllm.pd.proxy import Limits, Proxy

REFERENCE = {"do_remote_prefill": True, "do_remote_decode": False, "kvx_reference": {"id": "x"}}
PROMPT = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "min_tokens": 2}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9}


class Played:
    """A vLLM server that remembers what it was asked.

    Attributes:
        asked: The bodies of requests.
        params: What a prefill is answered with.
        status: Of every answer.
        gate: Answers wait for it.
        cancelled: Set when a client goes away meanwhile.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.params: object = REFERENCE
        self.status = 200
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = asyncio.Event()
        self.breaks_off = False
        self.is_well = True
        app = web.Application()
        for path in proxy.PATHS:
            app.router.add_post(path, self._answer)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        self.server = TestServer(app)

    @property
    def url(self) -> str:
        return str(self.server.make_url("")).rstrip("/")

    async def start(self) -> None:
        await self.server.start_server()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_well else 503)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(request.headers)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        if body.get("stream"):
            return await self._stream(request)
        return web.json_response({"choices": [{"text": "ok"}], "kv_transfer_params": self.params})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in ("a", "b"):
            await response.write(f"data: {piece}\n\n".encode())
        if self.breaks_off:
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(b"data: [DONE]\n\n")
        return response


class House:
    """A proxy with engines that are played."""

    def __init__(self, prefill: list[Played], decode: list[Played], client: TestClient) -> None:
        self.prefill = prefill
        self.decode = decode
        self.client = client

    async def ask(self, body: object, path: str = "/v1/completions") -> tuple[int, Any]:
        async with self.client.post(path, json=body) as response:
            return response.status, await response.json()

    async def metric(self, line: str) -> float:
        async with self.client.get("/metrics") as response:
            text = await response.text()
        found = [one for one in text.splitlines() if one.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


@contextlib.asynccontextmanager
async def house(
    prefills: int = 1, decodes: int = 1, *, prefill_s: float = 10.0, idle_s: float = 10.0
) -> AsyncIterator[House]:
    prefill, decode = [Played() for _ in range(prefills)], [Played() for _ in range(decodes)]
    async with contextlib.AsyncExitStack() as stack:
        for one in (*prefill, *decode):
            await one.start()
            stack.push_async_callback(one.server.close)
        limits = Limits(prefill_s, idle_s)
        made = Proxy([one.url for one in prefill], [one.url for one in decode], limits)
        server = TestServer(made.app())
        await server.start_server()
        client = await stack.enter_async_context(TestClient(server))
        for one in (*prefill, *decode):
            stack.callback(one.gate.set)
        yield House(prefill, decode, client)


async def eventually(condition: Any) -> bool:
    end = asyncio.get_running_loop().time() + 10.0
    while asyncio.get_running_loop().time() < end:
        if await condition():
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize(("path", "body"), zip(proxy.PATHS, (PROMPT, CHAT), strict=True))
async def test_a_prompt_is_prefilled_and_handed_over(path: str, body: dict[str, Any]) -> None:
    async with house() as at:
        status, answer = await at.ask(body, path)
        assert (status, answer["choices"]) == (200, [{"text": "ok"}])
        (prefilled,), (decoded,) = at.prefill[0].asked, at.decode[0].asked
        assert prefilled["max_tokens"] == 1
        assert prefilled.get("max_completion_tokens", 1) == 1
        assert "min_tokens" not in prefilled
        assert prefilled["kv_transfer_params"]["do_remote_decode"] is True
        assert decoded == {**body, "kv_transfer_params": REFERENCE}
        assert await at.metric('kvx_pd_proxy_prefills_total{outcome="handed_over"}') == 1
        assert await at.metric('kvx_pd_proxy_requests_total{status="200"}') == 1


async def test_an_answer_is_streamed_as_it_comes() -> None:
    async with house() as at:
        body = {**PROMPT, "stream": True, "stream_options": {"include_usage": True}}
        async with at.client.post("/v1/completions", json=body) as response:
            assert response.content_type == "text/event-stream"
            assert await response.text() == "data: a\n\ndata: b\n\ndata: [DONE]\n\n"
        assert at.prefill[0].asked[0]["stream"] is False
        assert "stream_options" not in at.prefill[0].asked[0]
        assert at.decode[0].asked[0]["stream_options"] == {"include_usage": True}


async def test_an_answer_that_breaks_off_is_not_taken_for_all_of_it() -> None:
    async with house() as at:
        at.decode[0].breaks_off = True
        with pytest.raises(Exception, match=r"payload|disconnected|closed|reset|transfer"):
            async with at.client.post(
                "/v1/completions", json={**PROMPT, "stream": True}
            ) as response:
                await response.read()


@pytest.mark.parametrize("how", ["errs", "is dead", "gives no reference", "is slow"])
async def test_without_a_prefill_the_decode_engine_computes(how: str) -> None:
    async with house(prefill_s=0.2 if how == "is slow" else 10.0) as at:
        engine = at.prefill[0]
        if how == "errs":
            engine.status = 500
        elif how == "is dead":
            await engine.server.close()
        elif how == "gives no reference":
            engine.params = None
        else:
            engine.gate.clear()
        status, _ = await at.ask({**PROMPT, "kv_transfer_params": {"do_remote_prefill": True}})
        assert status == 200
        assert at.decode[0].asked == [PROMPT]
        outcome = {
            "errs": "refused", "is dead": "failed", "gives no reference": "no_reference",
            "is slow": "timed_out",
        }[how]  # fmt: skip
        assert await at.metric(f'kvx_pd_proxy_prefills_total{{outcome="{outcome}"}}') == 1
        if how == "is slow":
            await asyncio.wait_for(engine.cancelled.wait(), 5)


async def test_who_waits_for_an_engine_that_goes_down_waits_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy, "_HEALTH_EVERY_S", 0.05)
    async with house(prefill_s=60.0) as at:
        engine = at.prefill[0]
        engine.gate.clear()
        waiting = asyncio.create_task(at.ask(PROMPT))

        async def is_asked() -> bool:
            return bool(engine.asked)

        assert await eventually(is_asked)
        engine.is_well = False
        status, _ = await asyncio.wait_for(waiting, 10)
        assert status == 200
        assert await at.metric('kvx_pd_proxy_prefills_total{outcome="went_down"}') == 1
        # It is not asked again until it is well.
        assert (await at.ask(PROMPT))[0] == 200
        assert await at.metric('kvx_pd_proxy_prefills_total{outcome="none_up"}') == 1
        assert len(engine.asked) == 1
        engine.is_well = True
        engine.gate.set()
        up = f'kvx_pd_proxy_engine_up{{role="prefill",url="{engine.url}"}}'

        async def is_back() -> bool:
            return await at.metric(up) == 1

        assert await eventually(is_back)
        assert (await at.ask(PROMPT))[0] == 200
        assert len(engine.asked) == 2


async def test_the_next_decode_engine_is_asked() -> None:
    async with house(decodes=2) as at:
        await at.decode[0].server.close()
        for _ in range(3):
            status, _ = await at.ask(PROMPT)
            assert status == 200
        assert len(at.decode[1].asked) == 3


async def test_without_a_decode_engine_the_error_says_so() -> None:
    async with house() as at:
        await at.decode[0].server.close()
        for _ in range(3):
            status, answer = await at.ask(PROMPT)
            assert status == 503
            assert "no decode engine answers" in answer["error"]["message"]
        async with at.client.get("/health") as response:
            assert response.status == 503
            assert "down" in (await response.json())["decode"].values()
        async with at.client.get("/v1/models") as response:
            assert response.status == 503


async def test_what_the_decode_engine_refuses_is_passed_on() -> None:
    async with house() as at:
        at.decode[0].status = 400
        assert await at.ask(PROMPT) == (400, {"error": {"message": "no"}})


async def test_malformed_requests_reach_nobody() -> None:
    async with house() as at:
        async with at.client.post("/v1/completions", data=b"{") as response:
            assert response.status == 400
            assert "not JSON" in (await response.json())["error"]["message"]
        assert (await at.ask([1]))[0] == 400
        async with at.client.get("/v2/nothing") as response:
            assert response.status == 404
            assert "/v1/completions" in (await response.json())["error"]["message"]
        assert not at.prefill[0].asked + at.decode[0].asked


async def test_several_prompts_at_once_have_no_reference() -> None:
    async with house() as at:
        for prompt in (["a", "b"], [[1, 2], [3]]):
            await at.ask({**PROMPT, "prompt": prompt})
        assert not at.prefill[0].asked
        assert await at.metric('kvx_pd_proxy_prefills_total{outcome="batch"}') == 2


async def test_a_client_that_goes_away_takes_its_request_along() -> None:
    async with house() as at:
        at.decode[0].gate.clear()
        async with ClientSession() as session:
            url = at.client.make_url("/v1/completions")
            asked = asyncio.create_task(session.post(url, json=PROMPT))

            async def is_asked() -> bool:
                return bool(at.decode[0].asked)

            assert await eventually(is_asked)
            asked.cancel()
        await asyncio.wait_for(at.decode[0].cancelled.wait(), 5)


async def test_credentials_are_passed_on_and_models_are_told() -> None:
    async with house() as at:
        headers = {"Authorization": "Bearer secret", "X-Request-Id": "7"}
        async with at.client.post("/v1/completions", json=PROMPT, headers=headers) as response:
            assert response.status == 200
        for one in (at.prefill[0], at.decode[0]):
            assert one.headers[0]["Authorization"] == "Bearer secret"
            assert one.headers[0]["X-Request-Id"] == "7"
        async with at.client.get("/v1/models") as response:
            assert (await response.json())["data"][0]["id"] == "m"
        async with at.client.get("/health") as response:
            assert json.loads(await response.text()) == {
                "prefill": {at.prefill[0].url: "up"}, "decode": {at.decode[0].url: "up"},
            }  # fmt: skip


def test_the_engine_with_the_fewest_requests_is_asked() -> None:
    engines = [Engine("a"), Engine("b"), Engine("c")]
    assert [choose(engines) for _ in range(4)] == [*engines, engines[0]]
    engines[1].in_flight = -1
    assert choose(engines) is engines[1]
    engines[1].note_failure()
    assert engines[1].is_up
    assert engines[1].note_failure()
    assert not engines[1].note_failure()
    assert choose(engines) is engines[2]
    assert choose(engines, besides=engines) is None
    assert engines[1].note_alive()
    assert not engines[1].note_alive()
    assert engines[1].is_up


def options(**changes: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    found = parser.parse_args(["--prefill", "http://a:1", "--decode", "http://b:2"])
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": "a:1"}, "'a:1' is no URL"),
        ({"decode": ","}, "--decode is empty"),
        ({"listen": "8000"}, "write HOST:PORT"),
        ({"listen": "host:70000"}, "write HOST:PORT"),
        ({"prefill_timeout": 0.0}, "--prefill-timeout is 0.0"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(kvx.UsageError, match=message):
        command.run(options(**change))


def test_without_aiohttp_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "kvx_vllm.pd.proxy")
    with pytest.raises(kvx.UnavailableError, match="needs aiohttp"):
        command.run(options())


def test_an_address_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(kvx.UnavailableError, match="cannot be listened on"):
            command.run(options(listen=where))
