"""The standard rows, with little of everything."""

import pytest

from kvx_bench.case import Options
from kvx_bench.cases import transfer
from kvx_bench.cases.transfer import TransferCase
from kvx_bench.row import Row
from kvx_bench.transfer import overheads
from kvx_bench.transfer.baselines.limits import TOP, limits_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    options = Options(is_quick=True, path=tmp_path_factory.mktemp("bench"), threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BATCHES", {4096: 32, 1 << 20: 2})
        patch.setattr(transfer, "_ROUND_TRIPS", 250)
        patch.setattr(transfer, "_POSTS", 5)
        patch.setattr(transfer, "_IDLE_S", 1.0)
        patch.setattr(overheads, "_POST_BLOCKS", 8)
        return {row.key: row for row in TransferCase().run(options)}


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize(("size", "num_bytes"), [("4KiB", 4096), ("1MiB", 1 << 20)])
@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_every_way_is_beside_its_limits(
    rows: dict[str, Row], backend: str, op: str, size: str, num_bytes: int
) -> None:
    row = rows[f"transfer.{backend}.{op}.{size}"]
    limit, *others = limits_of(backend, num_bytes)
    assert row.limit_name == limit
    assert list(row.ratios) == others
    assert row.ratio is not None
    assert row.ratio > 0
    assert row.gb_per_s is not None
    assert row.cpu_s_per_gb is not None
    assert row.cpu_s_per_gb > 0
    baseline = rows[f"transfer.baseline.{limit}.{op}.{size}"]
    assert row.limit == baseline.gb_per_s
    known = "known from the lease (prep:" if op == "read" else "computed while it is sent"
    assert known in row.note


def test_what_is_asked_for_is_there(rows: dict[str, Row]) -> None:
    assert "computed while" in rows["transfer.tcp.read.4KiB.sums-unknown"].note
    assert "one copy thread" in rows["transfer.shm.write.1MiB.one-thread"].note
    assert rows[f"transfer.baseline.{TOP}.read.4KiB"].ratio is None
    for backend in ("shm", "tcp"):
        for prepared in ("", ".prepared"):
            assert (rows[f"transfer.post.8.{backend}{prepared}"].p50_us or 0) > 0
        for op in ("read", "write"):
            row = rows[f"transfer.roundtrip.4KiB.{backend}.{op}"]
            assert 0 < (row.p50_us or 0) <= (row.p99_us or 0)
            assert row.limit_name == ("unix" if backend == "shm" else "sockets-default")
        share = rows[f"transfer.idle.{backend}"].cpu_share
        assert share is not None
        assert 0 <= share < 2


def test_what_is_not_here_says_why(rows: dict[str, Row]) -> None:
    assert rows["transfer.baseline.nixl"].note.startswith("not here because no --nixl-python")
    absent = rows["transfer.nixl"]
    assert absent.note.startswith("not here because")
    assert absent.gb_per_s is None
