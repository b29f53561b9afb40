"""The longer line: whole, late by as much as it should be, and still when it is frozen."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvx.errors import UnavailableError
from kvx_bench.s3.delay import DelayedLine
from kvx_bench.s3.service import Service

DELAY_S = 0.1
# What a timer may be early by, for clocks are read in other processes.
EARLY_S = 0.005
SOON_S = 0.2
PATIENCE_S = 20.0
BIG_BYTES = 16 << 20


class Echo(socketserver.BaseRequestHandler):
    """Sends back what comes, and hangs up when nothing more does."""

    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


@pytest.fixture
def server() -> Iterator[Service]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as listener:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever).start()
        yield Service(f"http://127.0.0.1:{listener.server_address[1]}")
        listener.shutdown()


def connect(line: DelayedLine) -> socket.socket:
    return socket.create_connection(line.service.address, PATIENCE_S)


def exchange(client: socket.socket, data: bytes) -> float:
    began = time.perf_counter()
    client.sendall(data)
    assert client.recv(len(data), socket.MSG_WAITALL) == data
    return time.perf_counter() - began


def test_all_of_it_arrives_in_both_directions(server: Service) -> None:
    data = np.random.default_rng(1).bytes(BIG_BYTES)
    with DelayedLine(server) as line, connect(line) as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        found = bytearray()
        while part := client.recv(1 << 20):
            found += part
        sender.join()
    assert found == data


def test_a_round_trip_takes_longer_and_the_first_one_twice(server: Service) -> None:
    with DelayedLine(server, delay_s=DELAY_S) as line, connect(line) as client:
        assert exchange(client, b"first") >= 2 * DELAY_S - EARLY_S
        times = [exchange(client, b"next") for _ in range(3)]
    assert min(times) >= DELAY_S - EARLY_S
    assert min(times) < 2 * DELAY_S


def test_what_follows_is_not_delayed_again(server: Service) -> None:
    data = np.random.default_rng(2).bytes(BIG_BYTES)
    with DelayedLine(server, delay_s=1.0) as line, connect(line) as client:
        receiver = threading.Thread(target=client.recv, args=(len(data), socket.MSG_WAITALL))
        receiver.start()
        began = time.perf_counter()
        client.sendall(data)
        receiver.join()
        # Sixteen pieces of a pipe's size: delayed one by one they would take sixteen seconds.
        assert time.perf_counter() - began < 8


def test_a_frozen_line_holds_what_is_on_it(server: Service) -> None:
    with DelayedLine(server) as line, connect(line) as client:
        exchange(client, b"before")
        with line.frozen():
            client.sendall(b"meanwhile")
            client.settimeout(SOON_S)
            with pytest.raises(TimeoutError):
                client.recv(1)
            with socket.create_connection(line.service.address, SOON_S) as another:
                another.sendall(b"x")
                with pytest.raises(TimeoutError):
                    another.recv(1)
        client.settimeout(PATIENCE_S)
        assert client.recv(9, socket.MSG_WAITALL) == b"meanwhile"


def test_clients_that_leave_are_forgotten(server: Service) -> None:
    with DelayedLine(server) as line:
        for _ in range(50):
            with connect(line) as client:
                exchange(client, b"x")
        with connect(line) as client:
            exchange(client, b"still there")


def test_a_server_that_is_gone_is_a_closed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with DelayedLine(Service(f"http://127.0.0.1:{port}")) as line, connect(line) as client:
        assert client.recv(1) == b""


def test_nobody_stands_between_two_who_speak_tls() -> None:
    with pytest.raises(UnavailableError, match="speaks TLS"):
        DelayedLine(Service("https://127.0.0.1:1"))
