"""What may be typed behind `kvx bench transfer`."""

import argparse
from pathlib import Path

import pytest

from kvx.errors import UsageError
from kvx_bench.command import add_arguments
from kvx_bench.transfer.matrix.options import MatrixOptions, is_asked, parse, read_key, with_scheme


def typed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["transfer", *arguments])


def parsed(*arguments: str) -> MatrixOptions:
    return parse(typed(*arguments))


def test_a_matrix_is_asked_for_by_any_of_its_options() -> None:
    assert not is_asked(typed())
    assert not is_asked(typed("--quick", "--json", "x", "--threads", "2", "--key-file", "k"))
    for arguments in (
        ("--check",), ("--listen",), ("--connect", "h:1"), ("--batch", "1"), ("--warmup", "0"),
        ("--plot", "x.png"), ("--duration", "0.5"), ("--memory", "host"),
    ):  # fmt: skip
        assert is_asked(typed(*arguments)), arguments


def test_cells_are_every_combination() -> None:
    cells = parsed(
        "--backends", "tcp,shm", "--block-sizes", "4KiB,2MiB", "--batch", "1,8", "--ops", "write",
        "--memory", "host,device",
    ).cells  # fmt: skip
    assert len(cells) == 2 * 2 * 2 * 2
    assert str(cells[0].work) == "write 1 x 4KiB"
    assert {cell.backend for cell in cells} == {"tcp", "shm"}
    assert {cell.memory for cell in cells} == {"host", "device"}


def test_the_defaults() -> None:
    found = parsed("--check")
    assert found.backends == ("shm", "tcp")
    works = [cell.work for cell in found.cells]
    assert {work.block_bytes for work in works} >= {4096, 64 << 10, 64 << 20}
    assert max(work.batch for work in works) == 1024
    assert found.num_bytes == 128 << 20
    assert (found.copy_threads, found.iterations, found.duration_s) == (0, None, 1.0)
    assert parsed("--connect", "h:1").backends == ("tcp",)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--ops", "reed"), "--ops 'reed'; accepted: read, write"),
        (("--memory", "moon"), "--memory 'moon'; accepted: host, device, host:device, device:host"),
        (("--batch", "0"), "--batch '0': numbers of blocks"),
        (("--batch", "1,x"), "--batch '1,x'"),
        (("--block-sizes", "4KB"), "no size"),
        (("--duration", "0"), "--duration 0.0: above 0"),
        (("--duration", "nan"), "--duration nan"),
        (("--iterations", "-1"), "--iterations -1"),
        (("--warmup", "-1"), "--warmup -1: 0 or more"),
        (("--backends", "shm,"), "--backends 'shm,'"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_accepted(
    arguments: tuple[str, ...], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        parsed(*arguments)


def test_the_memory_of_both_sides() -> None:
    cells = parsed("--memory", "host,device,device:host", "--ops", "read", "--block-sizes", "4KiB")
    assert [cell.kinds for cell in cells.cells[:3]] == [
        ("host", "host"), ("device", "device"), ("device", "host"),
    ]  # fmt: skip


def test_addresses_and_keys(tmp_path: Path) -> None:
    assert with_scheme("host:1") == "tcp://host:1"
    assert with_scheme("tcp://host:1") == "tcp://host:1"
    file = tmp_path / "key"
    file.write_bytes(b"0123456789abcdef\n")
    assert read_key(file) == b"0123456789abcdef"
    assert read_key(None) is None
    with pytest.raises(UsageError, match="openssl rand"):
        read_key(tmp_path / "none")
