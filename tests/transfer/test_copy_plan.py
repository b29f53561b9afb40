"""Plans of copies: executed on bytes, held against what the model predicts, and by example."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import UsageError
from kvx_ext import _core
from tests.transfer.copy_plan_model import (
    DEVICE,
    DIRECTIONS,
    HOST,
    SIZES,
    Call,
    Limits,
    Rates,
    Run,
    check_call,
    plan,
    predicted,
    rates,
)

KIB = 1024


@st.composite
def lists_of_runs(draw: st.DrawFn) -> tuple[str, list[Run], Limits]:
    """Runs as engines make them: grids, neighbours, holes, in some order; no targets overlap."""
    direction = draw(st.sampled_from(DIRECTIONS))
    size = draw(st.sampled_from([1, 3, 64, 100]))
    num_rows, num_columns = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    pitches = [size * draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2)]
    spans = [num_columns * pitch + draw(st.sampled_from([0, 0, 7])) for pitch in pitches]
    runs = [
        (HOST + row * spans[0] + column * pitches[0], HOST + row * spans[1] + column * pitches[1],
         size)
        for row in range(num_rows) for column in range(num_columns)
    ]  # fmt: skip
    runs = [run for run in runs if draw(st.integers(0, 9)) < 9]
    runs = [(t, s, size if draw(st.integers(0, 4)) else draw(st.integers(1, size)))
            for t, s, _ in runs]  # fmt: skip
    order = draw(st.sampled_from(["as is", "reversed", "shuffled", "columns"]))
    if order == "reversed":
        runs.reverse()
    elif order == "shuffled":
        runs = draw(st.permutations(runs))
    elif order == "columns":
        runs.sort(key=lambda run: (run[1] - HOST) % spans[1])
    pinned, base = [], HOST + draw(st.integers(-50, 100))
    for _ in range(draw(st.integers(0, 2))):
        num_bytes = draw(st.integers(1, 600))
        pinned.append((base, num_bytes, draw(st.integers(1, 300))))
        base += num_bytes + draw(st.sampled_from([0, 40]))
    limits = Limits(
        draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0, 7, 400, 10_000])),
        draw(st.sampled_from([1, 2, 3, 8192])), tuple(pinned),
    )  # fmt: skip
    return direction, runs, limits


def some_rates() -> st.SearchStrategy[Rates]:
    """Rates that make every method the best somewhere; at these sizes a run costs 4096 / rate."""
    rate = st.sampled_from([0.0, 0.001, 0.1, 1.0, 9.0, 10.0])
    return st.builds(
        lambda batch, rows, single, staged: rates(
            batch=batch, rows=rows, single=single, staged=staged, plain=50
        ),
        rate, rate, rate, rate,
    )  # fmt: skip


def shifted(direction: str, runs: list[Run]) -> list[Run]:
    """Put the device side where no pinned memory is."""
    target = DEVICE if direction in ("h2d", "d2d") else 0
    source = DEVICE if direction == "d2h" else (DEVICE << 1 if direction == "d2d" else 0)
    return [(t + target, s + source, b) for t, s, b in runs]


def execute(runs: list[Run]) -> npt.NDArray[np.uint8]:
    """Copy between two arenas; addresses count from the lowest that a run can have."""
    source = np.random.default_rng(1).integers(1, 256, 1 << 14, np.uint8)
    target = np.zeros(1 << 14, np.uint8)
    for t, s, num_bytes in runs:
        t_at, s_at = t % HOST, s % HOST
        target[t_at : t_at + num_bytes] = source[s_at : s_at + num_bytes]
    return target


@given(lists_of_runs(), some_rates())
def test_a_plan_copies_what_the_runs_copy(
    listed: tuple[str, list[Run], Limits], known: Rates
) -> None:
    """Also in any other order of the calls, which are checked one by one."""
    direction, runs, limits = listed
    runs = shifted(direction, runs)
    calls = plan(direction, runs, limits, known)
    for call in calls:
        check_call(direction, call, limits)
    expected = execute(runs)
    for some in (calls, calls[::-1]):
        assert (execute([run for call in some for run in call.runs]) == expected).all()


@given(lists_of_runs(), some_rates())
def test_no_uniform_choice_is_predicted_to_be_faster(
    listed: tuple[str, list[Run], Limits], known: Rates
) -> None:
    direction, runs, limits = listed
    calls = plan(direction, shifted(direction, runs), limits, known)
    if not known.gb_s.any():
        known = Rates(*_core.default_copy_calibration())
    if not known.gb_s[:, _core.copy_methods().index("single")].any() and not limits.has_batch:
        return  # nothing is known of what must be used
    chosen = predicted(direction, calls, known)
    merged = [run for call in calls for run in call.runs]
    scattered = ["single"] + ["batch"] * limits.has_batch
    for method in scattered:
        uniform = sum(known.ns(direction, method, num_bytes) for *_, num_bytes in merged)
        assert chosen <= uniform * (1 + 1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(
    st.sampled_from([1, 4096, 5000, 28 * KIB, 64 * KIB, 3 << 20, 9 << 20]),
    st.integers(2, 40),
    some_rates(),
    st.booleans(),
)
def test_equal_runs_go_by_the_cheapest_method(
    direction: str, num_bytes: int, count: int, known: Rates, has_batch: bool
) -> None:
    """By brute force: a grid that every method can do."""
    if not known.gb_s.any():
        return
    limits = Limits(has_batch, has_kernels=True, staging_bytes=2 * count * num_bytes)
    apart, close = 3 * num_bytes, num_bytes
    target, source = (apart, close) if direction == "h2d" else (close, apart)
    runs = [(DEVICE + i * target, HOST + i * source, num_bytes) for i in range(count)]
    calls = plan(direction, runs, limits, known)
    allowed = ["single", "rows"] + ["batch"] * has_batch + ["staged"] * (direction != "d2d")
    best = min(
        predicted(direction, [Call(method, tuple(runs), target, source, 0)], known)
        for method in allowed
    )
    assert len({call.method for call in calls}) == 1
    assert predicted(direction, calls, known) == best or best == float("inf")


@given(st.integers(1, 16 << 20), st.sampled_from(DIRECTIONS))
def test_prediction_between_measured_sizes(num_bytes: int, direction: str) -> None:
    """Linear in the logarithm of the size; a floor below, the plain rate above."""
    gb_s, plain = _core.default_copy_calibration()
    at = _core.copy_directions().index(direction)
    for place, method in enumerate(_core.copy_methods()):
        found = _core.predicted_copy_ns(direction, method, num_bytes, gb_s, plain)
        if not gb_s[at, place].any():
            assert found == float("inf")
            continue
        clipped = max(num_bytes, SIZES[0])
        rate = np.interp(np.log2(clipped), np.log2(SIZES), gb_s[at, place])
        rate = plain[at] if num_bytes > SIZES[-1] else rate
        assert found == pytest.approx(clipped / rate)


def grid(*, num_planes: int, slots: list[int], plane_bytes: int, is_block_major: bool) -> list[Run]:
    """Blocks of a layer-first cache (targets), each contiguous in its host slot (sources)."""
    places = itertools.product(range(num_planes), range(len(slots)))
    runs = [
        (DEVICE + plane * (4096 * plane_bytes) + (7 + 3 * block) * plane_bytes,
         HOST + (slots[block] * num_planes + plane) * plane_bytes, plane_bytes)
        for plane, block in places
    ]  # fmt: skip
    return sorted(runs, key=lambda run: run[1]) if is_block_major else runs


def test_neighbours_become_one_run() -> None:
    runs = [(DEVICE + i * 8 * KIB, HOST + i * 8 * KIB, 8 * KIB) for i in range(16)]
    for some in (runs, runs[::-1], runs[1::2] + runs[::2]):
        (call,) = plan("h2d", some, Limits())
        assert call.method == "single"
        assert call.runs == ((DEVICE, HOST, 128 * KIB),)


def test_neighbours_on_one_side_only_stay_apart() -> None:
    runs = [(DEVICE + i * 8 * KIB, HOST + i * 9 * KIB, 8 * KIB) for i in range(16)]
    (call,) = plan("h2d", runs, Limits())
    assert call.runs == tuple(runs)


def test_pieces_of_pinned_memory_cut_runs() -> None:
    """Merging stops at a boundary, and a run larger than a piece becomes several."""
    limits = Limits(pinned=((HOST, 10 * KIB, 4 * KIB),))
    (call,) = plan("h2d", [(DEVICE, HOST, 6 * KIB), (DEVICE + 6 * KIB, HOST + 6 * KIB, 6 * KIB)],
                   limits)  # fmt: skip
    assert [run[2] for run in call.runs] == [4 * KIB, 4 * KIB, 2 * KIB, 2 * KIB]
    outside = [(DEVICE, HOST + (1 << 30), 1 << 20)]
    assert plan("h2d", outside, limits)[0].runs == tuple(outside)


def test_a_piece_is_counted_on_the_host_side() -> None:
    limits = Limits(pinned=((HOST, 8 * KIB, 4 * KIB),))
    (call,) = plan("d2h", [(HOST, DEVICE, 8 * KIB)], limits)
    assert len(call.runs) == 2
    (call,) = plan("d2d", [(HOST, DEVICE, 8 * KIB)], limits)
    assert len(call.runs) == 1


def test_a_layer_first_cache_goes_plane_by_plane_as_rows() -> None:
    runs = grid(num_planes=64, slots=list(range(32)), plane_bytes=8 * KIB, is_block_major=False)
    calls = plan("h2d", runs, Limits(), rates(batch=5, rows=40, single=1, staged=44, plain=50))
    assert [(call.method, len(call.runs)) for call in calls] == [("rows", 32)] * 64
    assert calls[0].target_stride == 3 * 8 * KIB
    assert calls[0].source_stride == 64 * 8 * KIB


@pytest.mark.parametrize("is_block_major", [False, True])
def test_a_layer_first_cache_is_staged_slot_by_slot(is_block_major: bool) -> None:
    """Also when the list comes plane by plane, in which order no slot is contiguous."""
    runs = grid(num_planes=64, slots=[3, 9, 4, 30], plane_bytes=8 * KIB,
                is_block_major=is_block_major)  # fmt: skip
    limits = Limits(has_kernels=True, staging_bytes=64 << 20)
    calls = plan("h2d", runs, limits)
    assert [(call.method, len(call.runs)) for call in calls] == [
        ("staged", 128), ("staged", 64), ("staged", 64),
    ]  # fmt: skip


def test_nothing_is_staged_without_kernels() -> None:
    runs = grid(num_planes=64, slots=[0, 1], plane_bytes=8 * KIB, is_block_major=True)
    calls = plan("h2d", runs, Limits(has_kernels=False, staging_bytes=64 << 20))
    assert {call.method for call in calls} == {"batch"}


def test_a_staged_call_uses_half_the_staging_memory() -> None:
    runs = grid(num_planes=64, slots=[0], plane_bytes=8 * KIB, is_block_major=True)
    calls = plan("h2d", runs, Limits(has_kernels=True, staging_bytes=400 * KIB))
    assert [(call.method, call.num_bytes) for call in calls] == [
        ("staged", 176 * KIB), ("staged", 176 * KIB), ("staged", 160 * KIB),
    ]  # fmt: skip


def test_a_staged_call_of_mixed_runs_fits_too() -> None:
    """A fair share would be 190 KiB here, which 100 + 57 + 100 KiB pass by 67."""
    sizes = [100 * KIB, 57 * KIB, 100 * KIB, 123 * KIB]
    hosts = itertools.accumulate(sizes, initial=HOST)
    runs = [
        (DEVICE + (i << 20), host, b) for i, (host, b) in enumerate(zip(hosts, sizes, strict=False))
    ]
    limits = Limits(has_kernels=True, staging_bytes=400 * KIB)
    calls = plan("h2d", runs, limits, rates(batch=0.1, staged=44))
    assert [[run[2] // KIB for run in call.runs] for call in calls] == [[100, 57], [100], [123]]
    for call in calls:
        check_call("h2d", call, limits)


def test_one_source_for_many_targets_is_no_grid() -> None:
    """The driver takes no rows that overlap."""
    runs = [(DEVICE + 2 * i * KIB, HOST, KIB) for i in range(9)]
    (call,) = plan("h2d", runs, Limits(), rates(batch=1, rows=100))
    assert (call.method, len(call.runs)) == ("batch", 9)


def test_a_few_large_runs_do_not_decide_for_many_small_ones() -> None:
    runs: list[Run] = []
    host = HOST
    for i in range(130):
        num_bytes = 1 << 20 if i % 65 == 64 else 8 * KIB
        runs.append((DEVICE + 2 * i * (1 << 20), host, num_bytes))
        host += num_bytes
    calls = plan("h2d", runs, Limits(has_kernels=True, staging_bytes=64 << 20))
    assert [(call.method, len(call.runs)) for call in calls] == [
        ("staged", 64), ("staged", 64), ("batch", 2),
    ]  # fmt: skip
    assert [run[2] for run in calls[2].runs] == [1 << 20] * 2


def test_a_driver_call_takes_so_many_runs() -> None:
    runs = [(DEVICE + 3 * i * KIB, HOST + 2 * i * KIB, KIB) for i in range(9)]
    calls = plan("h2d", runs, Limits(batch_runs_max=4))
    assert [(call.method, len(call.runs)) for call in calls] == [
        ("batch", 4), ("batch", 4), ("single", 1),
    ]  # fmt: skip


def test_without_batches_runs_go_one_by_one() -> None:
    runs = [(DEVICE + 3 * i * KIB, HOST + (2 * i + i % 2) * KIB, KIB) for i in range(9)]
    (call,) = plan("h2d", runs, Limits(has_batch=False), rates(batch=9, single=1))
    assert (call.method, len(call.runs)) == ("single", 9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_runs_no_calls(direction: str) -> None:
    assert plan(direction, [], Limits(has_kernels=True, staging_bytes=1 << 20)) == []


@pytest.mark.parametrize(
    ("direction", "columns", "part"),
    [
        ("up", ([1], [2], [3]), "direction"),
        ("h2d", ([1], [2], [0]), "no bytes"),
        ("h2d", ([1, 2], [2], [1]), "differ in length"),
    ],
)
def test_lists_that_are_no_runs(direction: str, columns: tuple[list[int], ...], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        _core.plan_copies(direction, *(np.array(column, np.uint64) for column in columns))
