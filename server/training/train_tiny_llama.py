"""Train the byte-level tiny Llama that the reference engine ships with.

    python server/training/train_tiny_llama.py --minutes 35

The text is what `kvx_server.engine.corpus` reads: the running Python's own documentation. Needs
torch and safetensors. The learning rate follows the share of `--minutes` that has passed, so a run
ends on time on any machine; a checkpoint is written on the way, so an early stop leaves a model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_llama_torch import TinyLlama, TinyLlamaShape
from torch import Tensor
from torch.nn import functional

_SERVER_FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_SERVER_FOLDER))

from kvx_server.engine.corpus import Document, documents  # noqa: E402 - needs the path above

_BEGIN_TOKEN = 256
_END_TOKEN = 257
_LEARNING_RATE_MAX = 3e-3
_LEARNING_RATE_MIN = 1e-4
_WARMUP_STEPS = 100
# Every n-th document is only for validation.
_VALIDATION_EVERY = 25
_STEP_TOKENS = 4096
_SHORT_TOKENS = 512
_LONG_TOKENS = 4096
_MANY_LONG_FROM = 0.85
_REPORT_STEPS = 100
_CHECKPOINT_S = 150.0


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run was asked to do."""

    minutes: float
    folder: Path
    seed: int
    is_bfloat16: bool
    is_compiled: bool


def main() -> None:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    target = _SERVER_FOLDER / "kvx_server" / "engine" / "tiny_llama"
    parser.add_argument("--minutes", type=float, default=35.0, help="wall-clock time to train")
    parser.add_argument("--folder", type=Path, default=target, help="where the model is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    options = parser.parse_args()
    train(Run(options.minutes, options.folder, options.seed, options.bfloat16, options.compile))


def train(run: Run) -> None:
    """Train a model, print progress, and write checkpoints to `run.folder`."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    training, validation = _token_streams(documents())
    shape = TinyLlamaShape()
    model = TinyLlama(shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    _say(f"parameters {count}, training bytes {len(training)}, validation bytes {len(validation)}")
    _say(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {run.minutes} minutes, "
        f"seed {run.seed}, bfloat16 {run.is_bfloat16}, compiled {run.is_compiled}"
    )
    forward = torch.compile(model, dynamic=False) if run.is_compiled else model
    optimizer = _optimizer(model)
    start_s = saved_s = time.monotonic()
    step = tokens_seen = 0
    recent: list[float] = []
    while (elapsed_s := time.monotonic() - start_s) < run.minutes * 60:
        progress = elapsed_s / (run.minutes * 60)
        rate = _learning_rate(step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = _batch(training, _window_tokens(step, progress), generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.is_bfloat16):
            loss = _loss(forward(batch[:, :-1]), batch[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens_seen += batch.numel()
        recent.append(float(loss.detach()))
        if step % _REPORT_STEPS == 0:
            speed = tokens_seen / (time.monotonic() - start_s)
            mean = sum(recent) / len(recent)
            recent.clear()
            _say(
                f"step {step} elapsed {elapsed_s:.0f} s loss {mean:.4f} "
                f"rate {rate:.2e} tokens {tokens_seen} tokens/s {speed:.0f}"
            )
        if time.monotonic() - saved_s > _CHECKPOINT_S:
            saved_s = time.monotonic()
            save(model, run.folder)
            _say(f"checkpoint at step {step}, validation {_validate(model, validation, 512):.4f}")
    save(model, run.folder)
    for window in (_SHORT_TOKENS, _LONG_TOKENS):
        loss_value = _validate(model, validation, window)
        _say(f"final step {step} validation at {window} tokens {loss_value:.4f} nats/byte")


def save(model: TinyLlama, folder: Path) -> None:
    """Write `model.safetensors` (float16), `config.json` and the tokenizer files to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half() for name, value in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    # The writer makes it readable by its owner only.
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")
    _write_json(folder / "config.json", _config(model.shape))
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.context_tokens,
        },
    )


def _token_streams(corpus: list[Document]) -> tuple[Tensor, Tensor]:
    """Return (training, validation) tokens, each document between a begin and an end token."""
    streams: tuple[list[int], list[int]] = ([], [])
    for index, document in enumerate(corpus):
        stream = streams[1 if index % _VALIDATION_EVERY == 0 else 0]
        stream.append(_BEGIN_TOKEN)
        stream.extend(document.text.encode())
        stream.append(_END_TOKEN)
    return torch.tensor(streams[0]), torch.tensor(streams[1])


def _optimizer(model: TinyLlama) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=_LEARNING_RATE_MAX, betas=(0.9, 0.95), fused=True)


def _learning_rate(step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm * (_LEARNING_RATE_MIN + (_LEARNING_RATE_MAX - _LEARNING_RATE_MIN) * cosine)


def _window_tokens(step: int, progress: float) -> int:
    """Mostly short windows, some long ones from early on, more of them at the end."""
    every = 4 if progress > _MANY_LONG_FROM else 12
    return _LONG_TOKENS if step % every == every - 1 else _SHORT_TOKENS


def _batch(stream: Tensor, window: int, generator: torch.Generator) -> Tensor:
    count = _STEP_TOKENS // window
    starts = torch.randint(len(stream) - window - 1, (count,), generator=generator)
    return torch.stack([stream[start : start + window + 1] for start in starts.tolist()])


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def _validate(model: TinyLlama, stream: Tensor, window: int) -> float:
    losses = [float(_loss(model(rows[:, :-1]), rows[:, 1:])) for rows in _rows(stream, window)]
    return sum(losses) / len(losses)


def _rows(stream: Tensor, window: int) -> Iterator[Tensor]:
    for start in range(0, len(stream) - window - 1, window):
        yield stream[start : start + window + 1].unsqueeze(0)


def _config(shape: TinyLlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": _BEGIN_TOKEN,
        "eos_token_id": _END_TOKEN,
        "torch_dtype": "float16",
    }


def _tokenizer() -> dict[str, object]:
    """Return a `tokenizer.json` whose token ids are the bytes of the UTF-8 text themselves."""
    specials = [
        {
            "id": token,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, content in ((_BEGIN_TOKEN, "<|begin|>"), (_END_TOKEN, "<|end|>"))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letter: byte for byte, letter in enumerate(_byte_letters())},
            "merges": [],
        },
    }


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in GPT-2's byte-level vocabularies."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = []
    shifted = 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return letters


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
