"""`kvx pd-proxy`: one address for clients, before engines that prefill and engines that decode."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import kvx

if TYPE_CHECKING:
    import argparse

    from kvx_vllm.pd.proxy import Proxy

HELP = "OpenAI-compatible server that lets some vLLM engines prefill and others decode"
_PORT_MAX = 65535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--prefill", required=True, metavar="URL[,URL]", help="vLLM servers that compute prompts"
    )
    parser.add_argument(
        "--decode", required=True, metavar="URL[,URL]", help="vLLM servers that answer"
    )
    parser.add_argument(
        "--listen", default="127.0.0.1:8000", metavar="HOST:PORT",
        help="where clients connect (default: %(default)s; port 0 takes a free one)",
    )  # fmt: skip
    parser.add_argument(
        "--prefill-timeout", type=float, default=30.0, metavar="S",
        help="seconds after which the decode engine computes the prompt (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--idle-timeout", type=float, default=300.0, metavar="S",
        help="seconds without a byte after which an answer is given up (default: %(default)s)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Serve until a signal comes.

    Raises:
        kvx.UsageError: An option is malformed.
        kvx.UnavailableError: aiohttp is missing, or the address cannot be listened on.
    """
    prefill, decode = _urls("--prefill", options.prefill), _urls("--decode", options.decode)
    host, port = _address(options.listen)
    for name in ("prefill_timeout", "idle_timeout"):
        given, option = getattr(options, name), "--" + name.replace("_", "-")
        if given <= 0:
            raise kvx.UsageError(f"{option} is {given}; seconds above 0 are needed")
    try:
        from kvx_vllm.pd.proxy import Limits, Proxy  # noqa: PLC0415 - needs aiohttp
    except ModuleNotFoundError as error:
        raise kvx.UnavailableError(
            f"the proxy needs {error.name}, which comes with vLLM: run it in vLLM's environment, "
            "or `pip install aiohttp`"
        ) from None
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    proxy = Proxy(prefill, decode, Limits(options.prefill_timeout, options.idle_timeout))
    try:
        asyncio.run(_serve(proxy, host, port))
    except OSError as error:
        raise kvx.UnavailableError(
            f"{options.listen} cannot be listened on: {error}; take another --listen"
        ) from None
    return 0


async def _serve(proxy: Proxy, host: str, port: int) -> None:
    from aiohttp import web  # noqa: PLC0415 - see above

    # A client that goes away takes its request along, so that no engine computes for nobody.
    runner = web.AppRunner(proxy.app(), handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        where = runner.addresses[0]
        sys.stderr.write(f"kvx pd-proxy: listening on http://{where[0]}:{where[1]}\n")
        sys.stderr.flush()
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        await stopped.wait()
    finally:
        await runner.cleanup()


def _urls(option: str, text: str) -> list[str]:
    found = [one.strip().rstrip("/") for one in text.split(",") if one.strip()]
    for one in found:
        parts = urlsplit(one)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise kvx.UsageError(f"{option}: {one!r} is no URL; write http://HOST:PORT")
    if not found:
        raise kvx.UsageError(f"{option} is empty; write http://HOST:PORT")
    return found


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > _PORT_MAX:
        raise kvx.UsageError(f"--listen is {text!r}; write HOST:PORT, such as 127.0.0.1:8000")
    return host.strip("[]"), int(port)
