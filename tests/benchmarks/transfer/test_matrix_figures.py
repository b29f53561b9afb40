"""Figures, tables, CSV, JSON and pictures of a matrix."""

import csv
import importlib
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvx.errors import UnavailableError, UsageError
from kvx_bench.row import percentiles_us
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.matrix.figures import LimitRuns, absent, summarise
from kvx_bench.transfer.matrix.measure import Budget
from kvx_bench.transfer.matrix.options import Cell
from kvx_bench.transfer.matrix.plot import check_possible, draw
from kvx_bench.transfer.matrix.report import absences, table_of, write_csv, write_json
from kvx_bench.transfer.pair.pair import Burst

CELL = Cell("shm", "host", Work(is_write=False, block_bytes=1 << 20, batch=100))
GIGABYTES = 100 * (1 << 20) / 1e9
BURSTS = [
    Burst([0.1, 0.3], [0.01, 0.02], cpu_s=0.4, target_cpu_s=0.1),
    Burst([0.4], [0.06], cpu_s=0.2, target_cpu_s=0.2),
]
LINE = summarise(CELL, BURSTS, 0.005, limit=LimitRuns("memfd-memcpy", [0.1, 0.3]))


def test_figures_are_those_of_all_runs() -> None:
    assert LINE.iterations == 3
    assert LINE.gb_per_s == pytest.approx(3 * GIGABYTES / 0.8)
    assert LINE.avg_us == pytest.approx(800_000 / 3)
    assert (LINE.p50_us, LINE.p99_us) == pytest.approx((300_000, 400_000))
    assert LINE.prep_us == pytest.approx(5000)
    assert LINE.post_us == pytest.approx(20_000)
    assert LINE.cpu_s_per_gb == pytest.approx(0.6 / 3 / GIGABYTES)
    assert LINE.target_cpu_s_per_gb == pytest.approx(0.3 / 3 / GIGABYTES)


def test_ratios_are_paired_with_the_run_beside_each_burst() -> None:
    # 0.1 / 0.2 beside the first burst, 0.3 / 0.4 beside the second.
    assert LINE.ratio == pytest.approx(0.625)
    assert LINE.limit_gb_per_s == pytest.approx(GIGABYTES / 0.2)
    alone = summarise(CELL, BURSTS, 0.005)
    assert (alone.ratio, alone.limit_gb_per_s, alone.limit_name) == (None, None, "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3.0, 3.0)),
        ([1.0, 2.0, 9.0], (2.0, 9.0)),
        ([float(i) for i in range(1, 101)], (50.0, 99.0)),
        ([float(i) for i in range(1, 1001)], (500.0, 990.0)),
    ],
)
def test_percentiles(values: list[float], expected: tuple[float, float]) -> None:
    scaled = percentiles_us([value / 1e6 for value in reversed(values)])
    assert scaled == pytest.approx(expected)


def test_the_table_has_the_figures_and_why_others_are_missing() -> None:
    missing = absent(Cell("rdma", "device", CELL.work), "there is none")
    text = StringIO()
    Console(file=text, width=200).print(table_of([LINE, missing]))
    heading, row = text.getvalue().splitlines()
    for name in ("block", "batch", "B/W GB/s", "avg us", "p50 us", "p99 us", "prep us", "post us"):
        assert name in heading
    assert row.split() == [
        "shm", "host", "read", "1MiB", "100", "0.39", "266666.7", "300000.0", "400000.0", "5000",
        "20000.0", "1.907", "0.954", "0.52", "0.62", "memfd-memcpy",
    ]  # fmt: skip
    assert absences([LINE, missing, missing]) == [
        "rdma, device memory: not here because there is none"
    ]


def test_files_have_every_line(tmp_path: Path) -> None:
    lines = [LINE, absent(CELL, "why")]
    write_csv(tmp_path / "m.csv", lines)
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["absent"] for row in rows] == ["", "why"]
    assert float(rows[0]["ratio"]) == pytest.approx(0.625)
    assert rows[1]["gb_per_s"] == ""
    write_json(tmp_path / "m.json", {"cpus": 2}, lines)
    told = json.loads((tmp_path / "m.json").read_text())
    assert told["machine"] == {"cpus": 2}
    assert [line["block_bytes"] for line in told["matrix"]] == [1 << 20] * 2


def test_a_budget_ends_by_number_or_by_time() -> None:
    by_number = Budget(0.0, 3)
    assert by_number.next_runs() == 3
    by_number.take(BURSTS[0])
    assert by_number.next_runs() == 1
    by_number.take(BURSTS[1])
    assert by_number.next_runs() == 0
    by_time = Budget(0.5, None)
    by_time.take(BURSTS[0])
    assert by_time.next_runs() > 0
    by_time.take(BURSTS[1])
    assert by_time.next_runs() == 0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with kvx[bench]")
    path = tmp_path / f"m{suffix}"
    check_possible(path)
    draw(path, [LINE, absent(CELL, "why")])
    content = path.read_bytes()
    assert content[:4] == b"\x89PNG" if suffix == ".png" else b"shm read" in content
    draw(path, [])


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        check_possible(tmp_path / "m.txt")

    def no_module(name: str, *_: object) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", no_module)
    with pytest.raises(UnavailableError, match=r"pip install 'kvx\[bench\]'"):
        check_possible(tmp_path / "m.png")
