"""The server of `kvx pd-proxy`: a prompt to a prefill engine, its reference to a decode engine.

Whatever goes wrong with prefill, the decode engine gets the request without a reference and
computes the prompt itself: a client sees an error only when no decode engine serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

from kvx_vllm.pd.engines import Engine, choose

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_log = logging.getLogger(__name__)
PATHS = ("/v1/completions", "/v1/chat/completions")
_BODY_BYTES_MAX = 64 << 20
_CONNECT_S = 2.0
_HEALTH_EVERY_S = 1.0
# What a prefill does not need, or would refuse with one token.
_OF_DECODE = (
    "stream_options", "min_tokens", "best_of", "echo", "logprobs", "top_logprobs",
    "prompt_logprobs", "n",
)  # fmt: skip
_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
# Headers that belong to one connection, or that change on the way.
_OF_CONNECTION = frozenset(
    ["host", "content-length", "transfer-encoding", "connection", "keep-alive", "content-encoding"]
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the proxy waits.

    Attributes:
        prefill_s: Seconds for a prefill; then the decode engine computes the prompt.
        idle_s: Seconds without a byte of a decode engine after which its answer is given up.
    """

    prefill_s: float
    idle_s: float


class Proxy:
    """One proxy, of one event loop."""

    def __init__(self, prefill: list[str], decode: list[str], limits: Limits) -> None:
        """Ask nobody yet.

        Args:
            prefill: URLs of the engines that compute prompts.
            decode: Those of the engines that answer.
            limits: How long to wait.
        """
        self._prefill = [Engine(url) for url in prefill]
        self._decode = [Engine(url) for url in decode]
        self._limits = limits
        self._counts: Counter[tuple[str, str]] = Counter()
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application(client_max_size=_BODY_BYTES_MAX)
        app.cleanup_ctx.append(self._run)
        for path in PATHS:
            app.router.add_post(path, self._serve)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", _unknown)
        return app

    async def _run(self, _: web.Application) -> AsyncIterator[None]:
        """Hold connections, and look after the engines, while the application runs."""
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_S, sock_read=self._limits.idle_s
        )
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            self._session = session
            watches = [
                asyncio.create_task(self._watch(engine))
                for engine in (*self._prefill, *self._decode)
            ]
            yield
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    @property
    def _client(self) -> aiohttp.ClientSession:
        assert self._session is not None, "only a running application is asked"
        return self._session

    async def _watch(self, engine: Engine) -> None:
        """Ask an engine how it is, for ever."""
        limit = aiohttp.ClientTimeout(total=_HEALTH_EVERY_S)
        while True:
            try:
                async with self._client.get(engine.url + "/health", timeout=limit) as response:
                    is_well = response.status == 200  # noqa: PLR2004 - of HTTP
            except (aiohttp.ClientError, TimeoutError, OSError):
                is_well = False
            if is_well and engine.note_alive():
                _log.info("%s is back", engine.url)
            elif not is_well and engine.note_failure():
                _log.warning("%s is down: it does not answer /health", engine.url)
            await asyncio.sleep(_HEALTH_EVERY_S)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        """Answer a request of a client."""
        began_s = time.monotonic()
        try:
            body = await request.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return _error(400, f"the body is not JSON: {error}")
        if not isinstance(body, dict):
            return _error(400, "the body is not a JSON object")
        headers = _passed_on(request.headers)
        reference = await self._prefilled(request.path, headers, body)
        prefilled_s = time.monotonic() - began_s
        asked = {key: value for key, value in body.items() if key != "kv_transfer_params"}
        if reference is not None:
            asked["kv_transfer_params"] = reference
        response = await self._decoded(request, headers, asked)
        _log.info(
            "%s: %d, prefill %.3f s (%s), all %.3f s", request.path, response.status, prefilled_s,
            "without reference" if reference is None else "handed over", time.monotonic() - began_s,
        )  # fmt: skip
        self._counts["requests", str(response.status)] += 1
        return response

    async def _prefilled(
        self, path: str, headers: dict[str, str], body: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return the reference of a prefill; None, with the reason counted, without one."""
        if _is_batch(body):
            self._counts["prefills", "batch"] += 1
            return None
        engine = choose(self._prefill)
        if engine is None:
            self._counts["prefills", "none_up"] += 1
            return None
        asked = {key: value for key, value in body.items() if key not in _OF_DECODE}
        asked |= {"max_tokens": 1, "stream": False, "kv_transfer_params": _PREFILL}
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        with _flying(engine):
            outcome, params = await self._ask_prefill(engine, path, headers, asked)
        self._counts["prefills", outcome] += 1
        return params

    async def _ask_prefill(
        self, engine: Engine, path: str, headers: dict[str, str], body: dict[str, Any]
    ) -> tuple[str, dict[str, Any] | None]:
        """Return what became of a prefill, and its reference; ends when the engine goes down."""
        asked = asyncio.create_task(self._post_prefill(engine, path, headers, body))
        down = asyncio.create_task(engine.went_down.wait())
        try:
            await asyncio.wait(
                (asked, down), timeout=self._limits.prefill_s, return_when="FIRST_COMPLETED"
            )
            if asked.done():
                return asked.result()
            outcome = "went_down" if down.done() else "timed_out"
            _log.warning("%s: a prefill %s; the prompt is computed", engine.url, outcome)
            engine.note_failure()
            return outcome, None
        finally:
            for task in (asked, down):
                task.cancel()
            await asyncio.gather(asked, down, return_exceptions=True)

    async def _post_prefill(
        self, engine: Engine, path: str, headers: dict[str, str], body: dict[str, Any]
    ) -> tuple[str, dict[str, Any] | None]:
        try:
            async with self._client.post(engine.url + path, json=body, headers=headers) as response:
                if response.status != 200:  # noqa: PLR2004 - of HTTP
                    # What is wrong with the request the decode engine will say.
                    _log.warning("%s: a prefill was answered %d", engine.url, response.status)
                    return "refused", None
                answer = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            engine.note_failure()
            _log.warning("%s: a prefill failed: %s; the prompt is computed", engine.url, error)
            return "failed", None
        params = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
        if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
            return "no_reference", None
        return "handed_over", params

    async def _decoded(
        self, request: web.Request, headers: dict[str, str], body: dict[str, Any]
    ) -> web.StreamResponse:
        """Pass a request to a decode engine, and its answer to the client as it comes."""
        tried: list[Engine] = []
        said = "none is up"
        while (engine := choose(self._decode, tried)) is not None:
            tried.append(engine)
            with _flying(engine):
                try:
                    answer = await self._client.post(
                        engine.url + request.path, json=body, headers=headers
                    )
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    engine.note_failure()
                    said = f"{engine.url}: {error or type(error).__name__}"
                    _log.warning("decode engine %s; the next one is asked", said)
                    continue
                async with answer:
                    return await _relayed(request, answer)
        return _error(503, f"no decode engine answers ({said}); are they running?")

    async def _models(self, request: web.Request) -> web.StreamResponse:
        engine = choose(self._decode)
        if engine is None:
            return _error(503, "no decode engine is up")
        try:
            async with self._client.get(engine.url + request.path) as answer:
                return await _relayed(request, answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return _error(502, f"{engine.url}: {error or type(error).__name__}")

    async def _health(self, _: web.Request) -> web.Response:
        """Say which engines are up; well when one is that can answer."""
        found = {
            role: {one.url: "up" if one.is_up else "down" for one in engines}
            for role, engines in self._roles()
        }
        is_well = any(one.is_up for one in self._decode)
        return web.json_response(found, status=200 if is_well else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="\n".join(self._metric_lines()) + "\n")

    def _metric_lines(self) -> Iterator[str]:
        for name, label, text in (
            ("requests", "status", "Requests of clients, by the status they got"),
            ("prefills", "outcome", "Prefills, by what became of them"),
        ):
            yield f"# HELP kvx_pd_proxy_{name}_total {text}"
            yield f"# TYPE kvx_pd_proxy_{name}_total counter"
            for (counted, value), count in sorted(self._counts.items()):
                if counted == name:
                    yield f'kvx_pd_proxy_{name}_total{{{label}="{value}"}} {count}'
        gauges = (("engine_up", "Whether it answers"), ("engine_in_flight", "Requests it has"))
        for name, text in gauges:
            yield f"# HELP kvx_pd_proxy_{name} {text}"
            yield f"# TYPE kvx_pd_proxy_{name} gauge"
            for role, engines in self._roles():
                for one in engines:
                    number = int(one.is_up) if name == "engine_up" else one.in_flight
                    yield f'kvx_pd_proxy_{name}{{role="{role}",url="{one.url}"}} {number}'

    def _roles(self) -> tuple[tuple[str, list[Engine]], ...]:
        return ("prefill", self._prefill), ("decode", self._decode)


async def _relayed(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """Pass an answer on, piece by piece."""
    response = web.StreamResponse(status=answer.status, headers=_passed_on(answer.headers))
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await response.write(piece)
    except (aiohttp.ClientError, TimeoutError) as error:
        _log.warning("%s: the answer broke off: %s", answer.url, error or type(error).__name__)
        if request.transport is not None:
            request.transport.abort()  # a client must not take half an answer for all of it
        return response
    await response.write_eof()
    return response


@contextlib.contextmanager
def _flying(engine: Engine) -> Iterator[None]:
    """Count a request while an engine has it."""
    engine.in_flight += 1
    try:
        yield
    finally:
        engine.in_flight -= 1


def _is_batch(body: dict[str, Any]) -> bool:
    """Return whether a request has several prompts: a reference is of one."""
    prompt = body.get("prompt")
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


def _passed_on(headers: Any) -> dict[str, str]:
    return {name: text for name, text in headers.items() if name.lower() not in _OF_CONNECTION}


async def _unknown(request: web.Request) -> web.Response:
    known = ", ".join((*PATHS, "/v1/models", "/health", "/metrics"))
    return _error(404, f"{request.method} {request.path} is not served here; {known} are")


def _error(status: int, message: str) -> web.Response:
    """Return an error as OpenAI's clients understand it."""
    kind = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004 - of HTTP
    return web.json_response(
        {"error": {"message": message, "type": kind, "code": status}}, status=status
    )
