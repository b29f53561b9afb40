"""Accounts of prompts, alone: several groups, failures, and what comes after."""

from __future__ import annotations

import numpy as np

from kvx import Location, MissReason, TierKind
from kvx_vllm.account import Account, PlannedBlock

DRAM, NVME, S3 = TierKind.DRAM, TierKind.NVME, TierKind.S3


def planned(group: int, place: int, tier: TierKind, tokens: int = 32) -> PlannedBlock:
    return PlannedBlock(bytes([group, place]), place * tokens, (place + 1) * tokens, tier)


def located(*tiers: TierKind, reason: MissReason = MissReason.HIT) -> Location:
    return Location(np.array(tiers, np.uint8), reason)


def test_a_token_counts_for_the_slowest_tier_that_covers_it() -> None:
    account = Account()
    account.begin(0)
    account.plan([planned(0, 0, DRAM), planned(0, 1, DRAM), planned(1, 1, NVME)])
    assert account.tokens() == {"dram": 32, "nvme": 32}


def test_what_a_window_leaves_out_counts_for_the_slowest_of_all() -> None:
    account = Account()
    account.begin(0)
    account.plan([planned(0, 2, DRAM), planned(0, 3, S3)])
    assert account.tokens() == {"dram": 32, "s3": 96}


def test_what_the_engine_has_is_not_counted() -> None:
    account = Account()
    account.begin(32)
    account.plan([planned(0, 1, NVME)])
    account.settle([])
    assert account.told(["nvme"])["cached_tokens_details"] == {"gpu": 32, "nvme": 32}


def test_another_lookup_starts_over_and_remembers_what_failed() -> None:
    account = Account()
    account.begin(0)
    account.plan([planned(0, 0, DRAM), planned(0, 1, DRAM)])
    assert account.fail(planned(0, 0, DRAM).key, MissReason.CORRUPT)
    assert not account.fail(planned(0, 0, DRAM).key, MissReason.DEADLINE), "another rank said so"
    account.begin(0)
    assert account.tokens() == {}
    account.settle([])
    assert account.told([])["load_failures"] == {"corrupt": 1}
    assert account.reason is MissReason.CORRUPT


def test_what_is_loaded_after_a_preemption_is_another_story() -> None:
    account = Account()
    account.begin(0)
    account.plan([planned(0, 0, DRAM)])
    assert account.settle([])
    account.begin(64)
    account.plan([planned(0, 2, NVME)])
    assert not account.settle([])
    assert account.told(["dram"])["cached_tokens_details"] == {"gpu": 0, "dram": 32}


def test_the_group_that_ended_the_prefix_says_why() -> None:
    account = Account()
    account.begin(0)
    account.plan([planned(0, 0, DRAM), planned(0, 1, DRAM)])
    window = located(TierKind.NONE, DRAM, DRAM, reason=MissReason.NEVER_STORED)
    prefix = located(DRAM, DRAM, TierKind.NONE, reason=MissReason.EVICTED)
    account.settle([(0, 32, window), (0, 32, prefix)])
    assert account.reason is MissReason.EVICTED


def test_where_no_group_ended_just_there_any_reason_is_better_than_none() -> None:
    account = Account()
    account.begin(0)
    account.settle(
        [(0, 32, located(DRAM)), (0, 32, located(TierKind.NONE, reason=MissReason.SALT))]
    )
    assert account.reason is MissReason.SALT
