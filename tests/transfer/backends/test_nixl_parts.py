"""The parts of the NIXL backend that need neither NIXL nor a peer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import ConfigError, UnavailableError, UsageError
from kvx.transfer.backends import fields
from kvx.transfer.backends.nixl import NixlBackend, NixlOptions, messages, probe, rows
from kvx.transfer.core import LeaseRef
from tests.transfer.backends.fake_nixl import Fabric


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    try:
        message = messages.decode(data)
    except UsageError:
        return
    assert messages.decode(messages.encode(message)) == message


def test_messages_have_limits() -> None:
    with pytest.raises(UsageError, match="are allowed"):
        messages.decode(bytes(messages.MESSAGE_BYTES_MAX + 1))
    long = msgspec.msgpack.encode({"type": "hello", "name": "n" * 200})
    with pytest.raises(UsageError, match="malformed"):
        messages.decode(long)


def test_numbers_of_64_bits_arrive_whole() -> None:
    lease = LeaseRef((1 << 64) - 1, (1 << 32) - 1, (1 << 64) - 3)
    job = (1 << 63) - 1
    told = messages.decode(messages.encode(messages.Begin(job, fields.numbers_of(lease))))
    assert isinstance(told, messages.Begin)
    assert fields.lease_of(told.lease) == lease
    assert told.job == job


def canonical(block: tuple[int, ...]) -> list[int]:
    offset, stride, count, size = block
    return [offset + row * stride + byte for row in range(count) for byte in range(size)]


@given(st.data())
def test_runs_pair_every_byte_with_its_own(data: st.DataObject) -> None:
    local, remote = [], []
    for _ in range(data.draw(st.integers(1, 6))):
        total = data.draw(st.sampled_from([1, 12, 24, 30]))
        for side in (local, remote):
            size = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
            stride = data.draw(st.integers(size, size + 5))
            side.append((data.draw(st.integers(0, 50)), stride, total // size, size))
    runs = rows.cut(np.array(local, np.int64), np.array(remote, np.int64))
    pairs = [
        (ours + byte, theirs + byte)
        for ours, theirs, size in zip(runs.local, runs.remote, runs.sizes, strict=True)
        for byte in range(size)
    ]
    flat = [
        pair
        for ours, theirs in zip(local, remote, strict=True)
        for pair in zip(canonical(ours), canonical(theirs), strict=True)
    ]
    assert pairs == flat
    batches = rows.batches(runs, data.draw(st.integers(1, 100)))
    assert [one for batch in batches for one in range(batch.first, batch.end)] == list(
        range(len(local))
    )
    assert batches[-1].end_run == len(runs.sizes)
    for batch in batches:
        assert batch.end_run == runs.block_ends[batch.end - 1]


@pytest.mark.parametrize(
    "row", [(-1, 0, 1, 4), (0, 0, 1, 65), (0, 2, 2, 4), (0, 0, 0, 4), (0, 1 << 62, 3, 1 << 62)]
)
def test_blocks_outside_a_region_are_refused(row: tuple[int, ...]) -> None:
    blocks = np.array([(0, 0, 1, 64), row], np.int64)
    with pytest.raises(UsageError, match="local block 1"):
        rows.check(blocks, 64, "local")
    rows.check(blocks[:1], 64, "local")


def test_options_that_cannot_work_are_refused() -> None:
    for options in ({"backends": ()}, {"backends": ("UCX", "GDS")}, {"batch_bytes": 0}):
        with pytest.raises(ConfigError):
            NixlOptions(**options)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Have a NIXL to ask for, and nothing remembered."""
    probe.objection.cache_clear()
    monkeypatch.setattr(probe, "module_name", lambda: "nixl_cu13")
    monkeypatch.setattr(probe, "version_of", lambda _: "1.5.1")
    yield monkeypatch
    probe.objection.cache_clear()


def test_the_probe_asks_a_child_once(installed: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "noise\nkvx-nixl-probe: \n", "")

    installed.setattr(subprocess, "run", run)
    assert NixlBackend().availability() == ""
    assert NixlBackend().availability() == ""
    assert len(asked) == 1
    assert asked[0][1:] == ["-P", probe.__file__, "nixl_cu13", "UCX"]


def test_the_child_answers_from_anywhere(installed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvx").mkdir()
    (tmp_path / "kvx" / "__init__.py").write_text("raise SystemExit(3)")
    installed.chdir(tmp_path)
    assert "no_such_nixl is installed and cannot be" in probe._ask_child(
        "no_such_nixl", ("UCX",), 30.0
    )


def test_the_probe_says_why_not(installed: pytest.MonkeyPatch) -> None:
    def spins(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    installed.setattr(subprocess, "run", spins)
    assert probe.objection(("UCX",), 2.0) == "NIXL did not start UCX within 2 s"
    installed.setattr(
        subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, -11, "", "segmentation")
    )
    assert "with -11: segmentation" in probe.objection(("UCX",), 3.0)
    installed.setattr(probe, "version_of", lambda _: "1.6.0")
    assert "version 1.6.0" in probe.objection(("UCX",), 4.0)
    installed.setattr(probe, "module_name", lambda: "")
    assert "not installed" in probe.objection(("UCX",), 5.0)
    with pytest.raises(UnavailableError, match="not installed"):
        NixlBackend(NixlOptions(probe_timeout_s=5.0)).open(None)


def test_the_child_tries_what_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Fabric().bindings()
    monkeypatch.setattr(probe.importlib, "import_module", lambda _: bindings)
    assert probe.try_all("nixl_cu13", ["UCX"]) == ""
    assert "does not load" in probe.try_all("nixl_cu13", ["UCX", "EMPTY"])
    assert "does not start: no such device" in probe.try_all("nixl_cu13", ["BROKEN"])
