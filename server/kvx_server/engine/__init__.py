"""A reference inference engine in NumPy: small Llama models over a paged KV cache.

It exists to show and test KV movement without a GPU and without an inference framework, so its
results repeat bit for bit and it imports nothing but NumPy and the standard library. It knows
nothing of kvx: whoever calls it fills and reads the blocks of `Engine.block_bytes_view`.

    set_blas_threads(1)
    engine = Engine.load(tiny_llama_folder(), num_blocks=128)
    prompt = engine.tokenizer.encode("The import statement")
    print(engine.tokenizer.decode(engine.generate(prompt, max_tokens=200).tokens))
"""

from pathlib import Path

from kvx_server.engine.blas_threads import set_blas_threads
from kvx_server.engine.block_hashes import block_hashes
from kvx_server.engine.config import ModelConfig
from kvx_server.engine.engine import Engine
from kvx_server.engine.errors import (
    BlocksExhausted,
    DamagedCacheError,
    EngineError,
    ModelFormatError,
)
from kvx_server.engine.generation import FinishReason, Generation, PrefixCache
from kvx_server.engine.paged_cache import BlockAllocator, BlockShape, PagedKvCache
from kvx_server.engine.sampling import Sampler, Sampling
from kvx_server.engine.text_stream import TextStream
from kvx_server.engine.tokenizer import Tokenizer

__all__ = [
    "BlockAllocator",
    "BlockShape",
    "BlocksExhausted",
    "DamagedCacheError",
    "Engine",
    "EngineError",
    "FinishReason",
    "Generation",
    "ModelConfig",
    "ModelFormatError",
    "PagedKvCache",
    "PrefixCache",
    "Sampler",
    "Sampling",
    "TextStream",
    "Tokenizer",
    "block_hashes",
    "set_blas_threads",
    "tiny_llama_folder",
]


def tiny_llama_folder() -> Path:
    """Return the folder of the small byte-level model that comes with the engine."""
    return Path(__file__).parent / "tiny_llama"
