"""The engine: a model, its paged KV cache, and the operations a server is built from.

Prefill works in steps of `step_tokens` tokens that start at multiples of it, counted from the start
of the sequence, and pads the last step. Every token is therefore computed in a run of the same
shape, at the same place of it, whatever was cached before: KV bytes and logits are bit-identical
whether a prefix was computed or loaded. That holds between processes on equal processors with equal
numbers of BLAS threads (see `blas_threads.py`). A token that decode appended is computed alone and
may differ in the last bits; hence `generate` offers only blocks of the prompt to the prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvx_server.engine.block_hashes import block_hashes
from kvx_server.engine.config import ModelConfig
from kvx_server.engine.generation import FinishReason, Generation, PrefixCache
from kvx_server.engine.model import LlamaModel
from kvx_server.engine.paged_cache import BlockAllocator, BlockShape, KvDtype, PagedKvCache
from kvx_server.engine.rope import Rope
from kvx_server.engine.sampling import Sampler, Sampling
from kvx_server.engine.tokenizer import Tokenizer, load_tokenizer
from kvx_server.engine.weights import Weights

# Greedy; shared as a default because it is frozen.
_GREEDY = Sampling()


class Engine:
    """Computes logits for sequences whose KV lies in blocks; one thread at a time.

    Attributes:
        config: Architecture of the model.
        tokenizer: Tokenizer of the model.
        cache: The KV cache.
        allocator: Free blocks of the cache. A caller of `prefill` and `decode` takes blocks here.
        step_tokens: Tokens that prefill computes at a time.
        context_tokens: Longest sequence that can be computed.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        tokenizer: Tokenizer,
        cache: PagedKvCache,
        *,
        step_blocks: int = 1,
    ) -> None:
        """Put the parts together; `load` makes them from a folder.

        Raises:
            ValueError: `step_blocks` is not positive.
        """
        if step_blocks < 1:
            message = f"step_blocks must be at least 1, found {step_blocks}"
            raise ValueError(message)
        self.config = config
        self.tokenizer = tokenizer
        self.cache = cache
        self.allocator = BlockAllocator(cache.num_blocks)
        self.step_tokens = step_blocks * cache.shape.block_tokens
        cached_tokens_max = cache.num_blocks * cache.shape.block_tokens
        self.context_tokens = min(config.context_tokens, cached_tokens_max)
        # The padding of the last step has positions too.
        rope = Rope.build(config, self.context_tokens + self.step_tokens)
        self._model = LlamaModel(config, weights, rope)

    @classmethod
    def load(
        cls,
        path: Path | str,
        num_blocks: int,
        block_tokens: int = 64,
        *,
        step_blocks: int = 1,
        kv_dtype: KvDtype = "float32",
        storage: NDArray[np.uint8] | None = None,
    ) -> Engine:
        """Load a model folder in the format of Hugging Face.

        Args:
            path: Folder with config.json, tokenizer.json and model.safetensors (or its shards).
            num_blocks: Blocks of the KV cache.
            block_tokens: Tokens of one block.
            step_blocks: Blocks that prefill computes at a time. Larger is faster and bounds memory
                less; a cached prefix is reused in whole steps only.
            kv_dtype: Type of the cached keys and values.
            storage: Memory for the cache, see `PagedKvCache`.

        Raises:
            ModelFormatError: The folder is damaged or holds an unsupported model.
            ValueError: An argument is out of range.
        """
        folder = Path(path)
        config = ModelConfig.read(folder)
        shape = BlockShape(
            config.num_layers, block_tokens, config.num_kv_heads, config.head_dim, kv_dtype
        )
        cache = PagedKvCache(shape, num_blocks, storage=storage)
        weights = Weights.read(folder, config)
        return cls(config, weights, load_tokenizer(folder), cache, step_blocks=step_blocks)

    @property
    def block_bytes_view(self) -> NDArray[np.uint8]:
        """The KV cache as (num_blocks, block_bytes) uint8, the memory itself."""
        return self.cache.block_bytes_view

    def block_hashes(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the chained hash of every full block of a sequence, see `block_hashes.py`."""
        return block_hashes(tokens, self.cache.shape.block_tokens)

    def num_reusable_tokens(self, num_tokens: int, num_cached_tokens: int) -> int:
        """Return how many cached leading tokens `prefill` uses instead of computing them.

        Whole steps only, and never the last token, since its logits are wanted.
        """
        usable = min(num_cached_tokens, num_tokens - 1)
        return usable // self.step_tokens * self.step_tokens

    def prefill(
        self,
        tokens: Sequence[int],
        num_cached_tokens: int,
        block_ids: Sequence[int],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Compute a prompt after its cached prefix and return the logits of the next token.

        Args:
            tokens: The whole prompt, at least one token.
            num_cached_tokens: Leading tokens whose blocks are already filled.
            block_ids: Block table; covers the whole prompt.
            on_progress: Called after each step with the number of leading tokens now in the cache.

        Returns:
            (vocab_size,) float32.

        Raises:
            ValueError: The prompt is empty or too long, a token or block is unknown, or the blocks
                do not cover it.
        """
        prompt = self._checked(tokens)
        self._check_blocks(block_ids, len(prompt))
        if not 0 <= num_cached_tokens <= len(prompt):
            message = f"{num_cached_tokens} cached tokens in a prompt of {len(prompt)}"
            raise ValueError(message)
        hidden = np.empty(0, dtype=np.float32)
        start = self.num_reusable_tokens(len(prompt), num_cached_tokens)
        for position in range(start, len(prompt), self.step_tokens):
            end = min(position + self.step_tokens, len(prompt))
            step = np.zeros(self.step_tokens, dtype=np.int64)
            step[: end - position] = prompt[position:end]
            rows = self._model.forward(
                step,
                position=position,
                cache=self.cache,
                block_ids=block_ids,
                num_stored=end - position,
            )
            hidden = rows[end - position - 1]
            if on_progress is not None:
                on_progress(end)
        return self._model.logits(hidden)

    def decode(self, token: int, position: int, block_ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one token and return the logits of the next.

        Args:
            token: The token at `position`.
            position: How many tokens precede it, all of them in the cache.
            block_ids: Block table; covers `position + 1` tokens.

        Returns:
            (vocab_size,) float32.

        Raises:
            ValueError: As for `prefill`.
        """
        self._check_blocks(block_ids, position + 1)
        rows = self._model.forward(
            self._checked([token]),
            position=position,
            cache=self.cache,
            block_ids=block_ids,
            num_stored=1,
        )
        return self._model.logits(rows[0])

    def generate(
        self,
        prompt_tokens: Sequence[int],
        max_tokens: int,
        *,
        sampling: Sampling = _GREEDY,
        prefix_cache: PrefixCache | None = None,
        stop_tokens: Sequence[int] | None = None,
        on_token: Callable[[int], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Generation:
        """Continue a prompt; blocks are taken for the time of the call.

        Args:
            prompt_tokens: The prompt, at least one token.
            max_tokens: Most tokens to generate, at least 1.
            sampling: How tokens are chosen.
            prefix_cache: Where blocks of earlier prompts are loaded from and new ones saved to.
            stop_tokens: Tokens that end the generation; those of the model by default.
            on_token: Called with every generated token as soon as it is known.
            on_progress: As for `prefill`.

        Raises:
            ValueError: The prompt is empty, or longer than the context together with `max_tokens`.
            BlocksExhausted: The cache has too few free blocks.
            DamagedCacheError: Loaded blocks held values that the model cannot compute with.
        """
        num_tokens = self._num_tokens(len(prompt_tokens), max_tokens)
        stops = frozenset(self.config.end_tokens if stop_tokens is None else stop_tokens)
        sampler = Sampler(sampling)
        block_ids = self.allocator.allocate(self.cache.num_blocks_for(num_tokens))
        try:
            start_s = time.perf_counter()
            num_loaded = self._load_prefix(prompt_tokens, block_ids, prefix_cache)
            load_s = time.perf_counter() - start_s
            logits = self.prefill(prompt_tokens, num_loaded, block_ids, on_progress=on_progress)
            first_token = sampler.next_token(logits)
            ttft_s = time.perf_counter() - start_s
            if prefix_cache is not None:
                self._save_prefix(prompt_tokens, num_loaded, block_ids, prefix_cache)
            start_s = time.perf_counter()
            generated: list[int] = []
            reason = FinishReason.LENGTH
            for token in self._continuation(first_token, len(prompt_tokens), block_ids, sampler):
                if token in stops:
                    reason = FinishReason.STOP
                    break
                generated.append(token)
                if on_token is not None:
                    on_token(token)
                if len(generated) == max_tokens:
                    break
            decode_s = time.perf_counter() - start_s
        finally:
            self.allocator.free(block_ids)
        num_reused = self.num_reusable_tokens(len(prompt_tokens), num_loaded)
        return Generation(
            tokens=tuple(generated),
            finish_reason=reason,
            num_prompt_tokens=len(prompt_tokens),
            num_reused_tokens=num_reused,
            num_prefill_tokens=len(prompt_tokens) - num_reused,
            load_s=load_s,
            ttft_s=ttft_s,
            decode_s=decode_s,
        )

    def _num_tokens(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """Return how many tokens prompt and continuation may be; refuse what does not fit."""
        num_tokens = num_prompt_tokens + max_tokens
        if max_tokens < 1 or num_tokens > self.context_tokens:
            message = (
                f"max_tokens must be at least 1 and fit into {self.context_tokens} tokens together "
                f"with the prompt, found {max_tokens} after a prompt of {num_prompt_tokens}"
            )
            raise ValueError(message)
        return num_tokens

    def _continuation(
        self, token: int, position: int, block_ids: Sequence[int], sampler: Sampler
    ) -> Iterator[int]:
        """Yield a token and those that follow it; the next is computed when it is asked for."""
        while True:
            yield token
            token = sampler.next_token(self.decode(token, position, block_ids))
            position += 1

    def _load_prefix(
        self, tokens: Sequence[int], block_ids: Sequence[int], prefix_cache: PrefixCache | None
    ) -> int:
        """Return how many leading tokens the prefix cache has put into their blocks."""
        block_tokens = self.cache.shape.block_tokens
        # Blocks that prefill would compute again anyway are not asked for.
        count = self.num_reusable_tokens(len(tokens), len(tokens)) // block_tokens
        if prefix_cache is None or count == 0:
            return 0
        num_filled = prefix_cache.load(self.block_hashes(tokens)[:count], block_ids[:count])
        if not 0 <= num_filled <= count:
            message = f"the prefix cache filled {num_filled} of {count} blocks"
            raise ValueError(message)
        return num_filled * block_tokens

    def _save_prefix(
        self,
        tokens: Sequence[int],
        num_loaded: int,
        block_ids: Sequence[int],
        prefix_cache: PrefixCache,
    ) -> None:
        """Offer the full blocks of the prompt that were not loaded."""
        hashes = self.block_hashes(tokens)
        first = num_loaded // self.cache.shape.block_tokens
        if first < len(hashes):
            prefix_cache.save(hashes[first:], block_ids[first : len(hashes)])

    def _checked(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        array = np.asarray(tokens, dtype=np.int64)
        if array.ndim != 1 or not 0 < array.size <= self.context_tokens:
            message = f"a sequence has 1 to {self.context_tokens} tokens, found {array.shape}"
            raise ValueError(message)
        if array.min() < 0 or array.max() >= self.config.vocab_size:
            message = f"tokens are 0 to {self.config.vocab_size - 1}, found others"
            raise ValueError(message)
        return array

    def _check_blocks(self, block_ids: Sequence[int], num_tokens: int) -> None:
        if not 0 < num_tokens <= self.context_tokens:
            message = f"a sequence has 1 to {self.context_tokens} tokens, found {num_tokens}"
            raise ValueError(message)
        if len(block_ids) < self.cache.num_blocks_for(num_tokens):
            message = f"{len(block_ids)} blocks do not cover {num_tokens} tokens"
            raise ValueError(message)
        if min(block_ids) < 0 or max(block_ids) >= self.cache.num_blocks:
            message = f"blocks are 0 to {self.cache.num_blocks - 1}, found others"
            raise ValueError(message)
