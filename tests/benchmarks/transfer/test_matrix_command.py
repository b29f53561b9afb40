"""`kvx bench transfer` as it is typed: small matrices, wrong bytes, two hosts."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvx.cli.main import main
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.matrix import command
from kvx_bench.transfer.pair.initiator import Initiator
from kvx_bench.transfer.pair.pair import Pair
from tests.benchmarks.transfer.rig import pair_here
from tests.sim.cuda_driver import LIBRARY, SimulatedDriver

KEY = b"the key of two hosts"
SMALL = ("--block-sizes", "4KiB,64KiB", "--batch", "4", "--iterations", "2", "--warmup", "1")


def bench(*arguments: str) -> int:
    return main(["bench", "transfer", *arguments])


@pytest.mark.parametrize("more", [(), ("--check",)], ids=["timed", "checked"])
def test_both_ways_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    file = tmp_path / "m.json"
    assert bench("--backends", "shm,tcp,local,none-such", *SMALL, "--json", str(file), *more) == 0
    lines = json.loads(file.read_text())["matrix"]
    there = [line for line in lines if not line["absent"]]
    assert {(line["backend"], line["op"], line["block_bytes"]) for line in there} == {
        (backend, op, size)
        for backend in ("shm", "tcp") for op in ("read", "write") for size in (4096, 65536)
    }  # fmt: skip
    for line in there:
        assert line["iterations"] == 2
        assert line["gb_per_s"] > 0
        assert line["cpu_s_per_gb"] + line["target_cpu_s_per_gb"] > 0
        assert line["is_checked"] == bool(more)
        assert (line["ratio"] is None) == bool(more)
    shown = capsys.readouterr().out
    assert "within one process" in shown
    assert "none-such, host memory: not here because" in shown
    assert "RDMA" in shown


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_flipped_byte_ends_with_1_and_is_named(
    op: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte is flipped where it has arrived: nothing on the way could have noticed."""
    looks = []
    look = Pair.look

    @contextlib.contextmanager
    def spoiled() -> Iterator[Pair]:
        with pair_here(1 << 20) as (pair, initiator, target):

            def look_spoiled(self: Pair, work: Work, iteration: int) -> object:
                looks.append(iteration)
                if iteration == 2 and work.block_bytes == 4096:
                    (initiator if op == "read" else target).memory.load()[3 * 4096 + 5] ^= 1
                return look(self, work, iteration)

            monkeypatch.setattr(Pair, "look", look_spoiled)
            yield pair

    monkeypatch.setattr(command, "open_pair", lambda _backend, _options: spoiled())
    code = bench(
        "--check", "--backends", "tcp", "--block-sizes", "512B,4KiB", "--batch", "8",
        "--ops", op, "--iterations", "5",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 1
    assert looks == [0, 1, 2, 3, 4, 0, 1, 2]
    assert "512B" in shown  # what was right before is shown all the same
    assert f"{op} 8 x 4KiB over tcp, iteration 2: block 3 has" in shown
    assert "at offset 5" in shown


def test_nothing_to_measure_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--backends", "local", "--block-sizes", "4KiB", "--check") == 1
    assert "within one process" in capsys.readouterr().out


def test_a_mistake_is_told_and_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--ops", "reed") == 1
    assert "accepted: read, write" in capsys.readouterr().err
    assert main(["bench", "dram", "--ops", "read"]) == 1
    assert "dram takes no options of `kvx bench transfer`" in capsys.readouterr().err


def test_beyond_this_host_a_key_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--listen", "0.0.0.0:0") == 1
    assert "--key-file" in capsys.readouterr().err


def test_device_memory_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    code = bench(
        *SMALL, "--check", "--backends", "shm", "--memory", "host,device", "--driver", "libnone.so"
    )
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "shm, device memory: not here because there is no CUDA driver" in shown
    assert "GPU: not here because" in shown


@contextlib.contextmanager
def listening(key_file: Path) -> Iterator[str]:
    program = f"import sys; sys.path[:] = {sys.path!r}; from kvx.cli.main import main; "
    program += "sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, "bench", "transfer", "--listen", "127.0.0.1:0",
         "--key-file", str(key_file), "--memory-max", "1MiB"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield line.removeprefix("listening at ").split(";", 1)[0].split(",", 1)[0]
        process.send_signal(signal.SIGINT)


def test_between_two_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_file, other, file = tmp_path / "key", tmp_path / "other", tmp_path / "m.json"
    key_file.write_bytes(KEY + b"\n")
    other.write_bytes(KEY[::-1])
    with listening(key_file) as address:
        connect = ("--connect", address.removeprefix("tcp://"))
        secret = ("--key-file", str(key_file))
        assert bench(*connect, *secret, *SMALL, "--json", str(file)) == 0
        lines = json.loads(file.read_text())["matrix"]
        assert {line["backend"] for line in lines if line["gb_per_s"]} == {"tcp"}
        assert not [line for line in lines if line["absent"]]
        # A lease of so many blocks does not fit into one notification.
        many = ("--block-sizes", "64B", "--batch", "8000", "--iterations", "1")
        assert bench(*connect, *secret, *many, "--check") == 0
        capsys.readouterr()
        assert bench(*connect, *secret, "--block-sizes", "2MiB", "--batch", "1") == 1
        assert "--memory-max" in capsys.readouterr().out
        assert bench(*connect, "--key-file", str(other), *SMALL) == 1
        assert "key" in capsys.readouterr().out


def test_an_initiator_that_lost_its_target_says_so() -> None:
    with pair_here(4096) as (_, initiator, target):
        assert isinstance(initiator, Initiator)
        target.close()
        with pytest.raises(Exception, match="bench-target"):
            initiator.answer({"do": "theirs", "request": {"do": "cpu"}})


def test_device_memory_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated_driver: SimulatedDriver
) -> None:
    """Both processes find the simulated driver where they look for the real one."""
    assert simulated_driver.convictions() == []
    monkeypatch.setenv("LD_LIBRARY_PATH", str(LIBRARY.parent))
    file = tmp_path / "m.json"
    code = bench(
        *SMALL, "--check", "--ops", "read", "--backends", "cuda-ipc", "--memory",
        "device,host:device,device:host", "--json", str(file),
    )  # fmt: skip
    assert code == 0
    lines = json.loads(file.read_text())["matrix"]
    assert {line["memory"] for line in lines if line["gb_per_s"]} == {"device", "host:device"}
    reasons = {line["absent"] for line in lines if line["memory"] == "device:host"}
    assert len(reasons) == 1
    assert "what is to be read is host memory" in reasons.pop()
