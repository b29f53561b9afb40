"""The list of reasons is closed: names and numbers are in metrics, events and responses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from kvx.cache.reasons import MissReason

GOLDEN = {
    "HIT": 0,
    "NEVER_STORED": 1,
    "EVICTED": 2,
    "EXPIRED": 3,
    "DROPPED": 4,
    "ADMISSION_REJECTED": 5,
    "NAMESPACE_MISMATCH": 6,
    "SALT": 7,
    "CORRUPT": 8,
    "STALE": 9,
    "DEADLINE": 10,
    "CANCELLED": 11,
    "TIER_DOWN": 12,
    "QUOTA": 13,
    "NO_ROOM": 14,
    "IN_FLIGHT": 15,
}
MISS_HISTORY = Path(__file__).parents[2] / "kvx_ext/include/kvx/miss_history.h"


def test_names_and_numbers() -> None:
    assert {reason.name: int(reason) for reason in MissReason} == GOLDEN


@pytest.mark.parametrize("reason", MissReason)
def test_every_reason_has_its_own_explanation(reason: MissReason) -> None:
    assert len(reason.explanation) > 10
    assert [other.explanation for other in MissReason].count(reason.explanation) == 1
    assert MissReason.named(reason.name.lower()) is reason


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="LOST"):
        MissReason.named("lost")


def test_every_code_of_the_history_has_a_reason() -> None:
    """The numbers are those of the native header; the ones it lists all mean something."""
    text = MISS_HISTORY.read_text().split("enum class RemovalReason")[1].split("};")[0]
    native = {name: int(code) for name, code in re.findall(r"k(\w+) = (\d+)", text)}
    codes = np.array(sorted(native.values()), np.uint8)
    reasons = [MissReason(int(reason)).name for reason in MissReason.of_history(codes)]
    assert dict(zip(codes.tolist(), reasons, strict=True)) == {
        0: "NEVER_STORED",
        1: "EVICTED",
        2: "EXPIRED",
        3: "DROPPED",
        4: "CORRUPT",
        5: "EVICTED",
        6: "DROPPED",
        7: "TIER_DOWN",
        8: "EVICTED",
    }


def test_codes_survive_the_history() -> None:
    for reason in MissReason:
        if reason.name in {"NEVER_STORED", "EVICTED", "EXPIRED", "DROPPED", "CORRUPT"}:
            codes = np.array([reason.history_code], np.uint8)
            assert MissReason.of_history(codes).tolist() == [reason]
