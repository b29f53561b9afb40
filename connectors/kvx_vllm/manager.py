"""Answers the scheduler: which blocks are there, and what to load and to store."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingManager,
    OffloadKey,
    OffloadPolicy,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_block_hash,
    get_offload_group_idx,
    make_offload_key,
)

import kvx
from kvx_vllm.account import Account, PlannedBlock
from kvx_vllm.events import Announcer
from kvx_vllm.metrics import Meter
from kvx_vllm.specs import KvxBlocks, Run

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import OffloadingEvent, ScheduleEndContext
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    from kvx_vllm.pd.handoff import Handoff
    from kvx_vllm.ranks import Ranks
    from kvx_vllm.settings import Settings
    from kvx_vllm.specs import LoadFailure
    from kvx_vllm.telling import Told

# Names of vLLM's `CacheHitSource`, which 0.31 has not.
_SOURCES = {
    kvx.TierKind.HBM: "HOST",
    kvx.TierKind.DRAM: "HOST",
    kvx.TierKind.NVME: "DISK",
    kvx.TierKind.S3: "DISK",
    kvx.TierKind.PEER: "P2P",
}


@dataclass(slots=True)
class Answer:
    """Where the blocks of one group of a prompt are.

    Attributes:
        first: Place of the first block asked for.
        location: Of it and those after it.
    """

    first: int
    location: kvx.Location


@dataclass(slots=True)
class Request:
    """A request the scheduler has not let go of.

    Attributes:
        chains: The hashes of its prompt so far, for each group.
        num_computed: Tokens that the engine has already.
        answers: For each group; emptied when the scheduler asks anew.
        asked_at: When S3 was first asked for it, of the monotonic clock; None before that.
        is_outdated: Whether its KV is from before a reset; until vLLM computes it anew.
        account: What became of its prompt. Blocks that failed are not tried again.
    """

    chains: list[list[bytes]] = field(default_factory=list)
    num_computed: int = 0
    answers: dict[int, Answer] = field(default_factory=dict)
    asked_at: float | None = None
    account: Account = field(default_factory=Account)
    is_outdated: bool = False


class KvxManager(OffloadingManager):
    """The scheduler's view of the cache. Holds no truth of its own: every lookup asks the ranks."""

    def __init__(
        self, config: OffloadingConfig, settings: Settings, ranks: Ranks, handoff: Handoff
    ) -> None:
        """Know no request."""
        self._settings = settings
        self._ranks = ranks
        self._handoff = handoff
        self._requests: dict[str, Request] = {}
        self._tokens = [group.tokens_per_block for group in config.groups]
        self._hashes_per_block = [tokens // config.cache.tokens_per_hash for tokens in self._tokens]
        self._group_ids = {place: group.group_id for place, group in enumerate(config.groups)}
        self._place_of = {group_id: place for place, group_id in self._group_ids.items()}
        self._meter = Meter()
        self._announcer = Announcer(config.parallel.world_size, self._group_ids)
        self._tiers = [tier.kind for tier in settings.cache.tiers]
        self._counts_from_start = any(tier.kind == "s3" for tier in settings.cache.tiers)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Remember a request."""
        self._requests[req_context.req_id] = Request()
        if self._handoff.begin(req_context.req_id, req_context.kv_transfer_params):
            return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget a request."""
        self._requests.pop(req_context.req_id, None)
        self._handoff.finished(req_context.req_id)

    def issue_reference(
        self, req_id: str, hashes: Sequence[bytes], num_tokens: int
    ) -> dict[str, Any]:
        """Return the `kv_transfer_params` of a prefill for another engine; empty of other requests.

        Args:
            req_id: Of the request.
            hashes: Of its blocks.
            num_tokens: Of its prompt.
        """
        chains = self._chains(hashes)
        limits = [num_tokens // tokens for tokens in self._tokens]
        found = [chain[:limit] for chain, limit in zip(chains, limits, strict=True)]
        return self._handoff.issue(req_id, found)

    def begin_lookup(self, req_id: str, hashes: Sequence[bytes], num_computed: int) -> None:
        """Take the hashes of a prompt that is about to be looked up, all of them."""
        request = self._requests.get(req_id)
        if request is None:
            return
        request.chains = self._chains(hashes)
        request.num_computed = num_computed
        request.answers.clear()
        request.is_outdated = False
        request.account.begin(num_computed)
        self._handoff.look(req_id, request.chains)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Say whether a block can be loaded; RETRY while S3 or another rank has not said."""
        request = self._requests[req_context.req_id]
        group = self._place_of[get_offload_group_idx(key)]
        if key in request.account.failures:
            return LookupResult.MISS
        answer = self._answer(request, group)
        if answer is None:
            return LookupResult.RETRY
        end_token = req_context.get_offload_key_position(key) or 0
        place = end_token // self._tokens[group] - 1 - answer.first
        location = answer.location
        if end_token % self._tokens[group] or not 0 <= place < len(location.tiers):
            return LookupResult.MISS  # a partial tail: computed sooner than it is looked for
        tier = location.tiers[place]
        if tier == kvx.TierKind.PEER and self._handoff.is_pending(req_context.req_id):
            return LookupResult.RETRY
        if tier:
            return LookupResult.HIT
        if self._handoff.expects(req_context.req_id, group, place + answer.first):
            return LookupResult.RETRY
        return LookupResult.MISS if location.is_final else LookupResult.RETRY

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        """Return which of vLLM's kinds of tier a block comes from."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415 - 0.32 asks

        tier = self._tier_of(key, req_context)
        return CacheHitSource[_SOURCES.get(tier, "EXTERNAL_UNSPECIFIED")]

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> KvxBlocks:
        """Return what the workers load; what is evicted until then is computed."""
        planned = [self._planned(key, req_context) for key in keys]
        self._requests[req_context.req_id].account.plan(planned)
        runs = self._runs(list(keys), req_context)
        tiers = iter(bytes(block.tier for block in planned))
        for run in runs:
            run.tiers.extend(itertools.islice(tiers, len(run.hashes)))
        return KvxBlocks(req_context.req_id, runs, self._ranks.life)

    def complete_load(
        self,
        keys: Collection[OffloadKey],  # noqa: ARG002 - vLLM's
        req_context: ReqContext,
    ) -> None:
        """Account for a load that is over."""
        request = self._requests.get(req_context.req_id)
        if request is not None:
            tiers = [block.tier for block in request.account.planned]
            self._handoff.loaded(req_context.req_id, from_peers=tiers.count(kvx.TierKind.PEER))

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput:
        """Return what the workers store; what the cache has already, it does not copy again.

        Partial tails are left out: their hashes are in no chain that is counted from the start.
        """
        is_void = self._is_outdated(req_context)
        wanted = [key for key in keys if not is_void and self._is_whole(key, req_context)]
        self._handoff.storing(req_context.req_id, wanted)
        runs = self._runs(wanted, req_context, is_store=True)
        blocks = KvxBlocks(req_context.req_id, runs, self._ranks.life)
        return PrepareStoreOutput(wanted, blocks, [])

    def complete_store(
        self,
        keys: Collection[OffloadKey],
        req_context: ReqContext,
        success: bool = True,  # noqa: ARG002, FBT001, FBT002 - vLLM's
    ) -> None:
        """Note that blocks are stored, or could not be."""
        self._handoff.stored(req_context.req_id, keys)

    def note_failures(self, failures: Sequence[LoadFailure]) -> None:
        """Take from the workers what could not be loaded: it is computed, and not tried again."""
        for failure in failures:
            request = self._requests.get(failure.req_id)
            if request is None:
                continue
            self._handoff.failed(failure.req_id, len(failure.hashes))
            group_id = self._group_ids[failure.group]
            fresh = [
                reason
                for one, reason in zip(failure.hashes, failure.reasons, strict=True)
                if request.account.fail(
                    make_offload_key(one, group_id), kvx.MissReason.named(reason)
                )
            ]
            self._meter.note_failures(fresh)

    def note_told(self, told: Told) -> None:
        """Take what the ranks tell."""
        self._meter.note_tally(told.tally)
        self._announcer.note(told.changes)
        for served in told.diverted:
            request = self._requests.get(served.req_id)
            if request is not None:
                key = make_offload_key(served.block_hash, self._group_ids[served.group])
                request.account.divert(key, served.tier)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Close the account of prompts that are computed now, with what was loaded for them."""
        for req_id in context.new_req_ids:
            request = self._requests.get(req_id)
            if request is not None and self._settle(request):
                self._meter.note_prompt(request.account.tokens(), request.account.reason)

    def told(self, req_id: str) -> dict[str, object] | None:
        """Return what the response of a request says of its prompt; None if it is not known."""
        request = self._requests.get(req_id)
        if request is None:
            return None
        self._settle(request)
        return request.account.told(self._tiers)

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Return the metrics since the last call."""
        self._meter.note_references(self._handoff.take_outcomes())
        return self._meter.take()

    def take_events(self) -> Iterator[OffloadingEvent]:
        """Yield what the tiers stored and let go since the last call."""
        return self._announcer.take()

    def reset_cache(self) -> None:
        """Let nothing be found that was stored before."""
        self._handoff.reset()
        for request in self._requests.values():
            request.answers.clear()
            request.is_outdated = True
        self._ranks.reset()

    def meet_ranks(self, paths: Mapping[int, Path]) -> None:
        """Take from vLLM where ranks in other processes listen."""
        self._ranks.meet(paths)

    def shutdown(self) -> None:
        """Let the ranks go."""
        self._handoff.close()
        self._ranks.close()

    def _chains(self, hashes: Sequence[bytes]) -> list[list[bytes]]:
        """Return the hashes of the blocks of each group."""
        return [list(hashes[per_block - 1 :: per_block]) for per_block in self._hashes_per_block]

    def _is_outdated(self, req_context: ReqContext) -> bool:
        """Return whether a request computed KV before a reset and goes on with it."""
        request = self._requests.get(req_context.req_id)
        return request is not None and request.is_outdated

    def _answer(self, request: Request, group: int) -> Answer | None:
        found = request.answers.get(group)
        if found is not None:
            return found
        first = request.num_computed // self._tokens[group]
        location = self._ranks.locate(group, request.chains[group], first)
        if location is None:
            return None
        now_s = time.monotonic()
        request.asked_at = request.asked_at or now_s
        if not location.is_final and now_s - request.asked_at > self._settings.lookup_deadline_s:
            location = kvx.Location(location.tiers, kvx.MissReason.DEADLINE, is_final=True)
        found = request.answers[group] = Answer(first, location)
        return found

    def _settle(self, request: Request) -> bool:
        """Close the account of a request; False when it was closed before."""
        return request.account.settle(
            (answer.first, self._tokens[group], answer.location)
            for group, answer in request.answers.items()
        )

    def _planned(self, key: OffloadKey, req_context: ReqContext) -> PlannedBlock:
        tokens = self._tokens[self._place_of[get_offload_group_idx(key)]]
        end = req_context.get_offload_key_position(key) or 0
        begin = (end - 1) // tokens * tokens
        return PlannedBlock(key, begin, end, self._tier_of(key, req_context))

    def _is_whole(self, key: OffloadKey, req_context: ReqContext) -> bool:
        tokens = self._tokens[self._place_of[get_offload_group_idx(key)]]
        return (req_context.get_offload_key_position(key) or 0) % tokens == 0

    def _tier_of(self, key: OffloadKey, req_context: ReqContext) -> kvx.TierKind:
        group = self._place_of[get_offload_group_idx(key)]
        answer = self._requests[req_context.req_id].answers.get(group)
        if answer is None:
            return kvx.TierKind.NONE
        end_token = req_context.get_offload_key_position(key) or 0
        place = end_token // self._tokens[group] - 1 - answer.first
        if not 0 <= place < len(answer.location.tiers):
            return kvx.TierKind.NONE
        return kvx.TierKind(int(answer.location.tiers[place]))

    def _runs(
        self, keys: Sequence[OffloadKey], req_context: ReqContext, *, is_store: bool = False
    ) -> list[Run]:
        """Cut keys, which come group by group, where a group ends; stores, where blocks lack."""
        runs: list[Run] = []
        before = (-1, -1)
        for key in keys:
            group = self._place_of[get_offload_group_idx(key)]
            place = (req_context.get_offload_key_position(key) or 0) // self._tokens[group] - 1
            goes_on = before[0] == group and (not is_store or place == before[1] + 1)
            if not goes_on:
                runs.append(Run(group, [], self._prefix(req_context, group, place, is_store)))
            runs[-1].hashes.append(get_offload_block_hash(key))
            before = (group, place)
        return runs

    def _prefix(
        self,
        req_context: ReqContext,
        group: int,
        place: int,
        is_store: bool,  # noqa: FBT001
    ) -> list[bytes]:
        request = self._requests.get(req_context.req_id)
        if not (is_store and self._counts_from_start) or request is None or not request.chains:
            return []
        return request.chains[group][:place]
