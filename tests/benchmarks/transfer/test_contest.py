"""Contestants in turn: who ran when, and that ratios are those of the same round."""

from collections.abc import Callable

import pytest

from kvx_bench.row import Sample
from kvx_bench.transfer.contest import Contest, hold


def test_everybody_warms_up_and_then_runs_once_a_round() -> None:
    calls: list[str] = []

    def runner(name: str) -> Callable[[], Sample]:
        def run() -> Sample:
            calls.append(name)
            return Sample(float(len(calls)), 0.0)

        return run

    contest = hold({"a": runner("a"), "b": runner("b")}, 10, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    # The warm-up, samples 1 and 2, is not among them.
    assert [one.wall_s for one in contest.samples["a"]] == [3, 6, 7]
    assert [one.wall_s for one in contest.samples["b"]] == [4, 5, 8]


def test_ratios_are_paired_so_that_a_slow_round_hits_both() -> None:
    mine = [Sample(1.0, 2.0), Sample(10.0, 2.0), Sample(4.0, 8.0)]
    limit = [Sample(0.5, 1.0), Sample(5.0, 1.0), Sample(1.0, 1.0)]
    contest = Contest(4_000_000_000, {"mine": mine, "limit": limit})
    assert contest.ratio("mine", "limit") == 0.5
    assert contest.gb_per_s("mine") == 1.0
    assert contest.cpu_s_per_gb("mine") == 0.5
    row = contest.row("key", "mine", "limit", note="n")
    assert (row.key, row.gb_per_s, row.limit, row.ratio) == ("key", 1.0, 4.0, 0.5)
    assert (row.cpu_s_per_gb, row.note) == (0.5, "n")


def test_who_has_no_limit_has_no_ratio() -> None:
    row = Contest(1, {"mine": [Sample(1.0, 0.0)]}).row("key", "mine")
    assert (row.limit, row.ratio) == (None, None)


def test_rounds_that_do_not_match_are_our_bug() -> None:
    contest = Contest(1, {"a": [Sample(1.0, 0.0)] * 2, "b": [Sample(1.0, 0.0)]})
    with pytest.raises(ValueError, match="zip"):
        contest.ratio("a", "b")
