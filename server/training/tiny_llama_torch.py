"""The Llama architecture in a hundred lines of torch, with the parameter names of Hugging Face.

Used only to train the tiny model. `state_dict()` holds what `LlamaForCausalLM` expects, so a saved
checkpoint loads there and in `kvx_server.engine` alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class TinyLlamaShape:
    """Sizes of the model; the defaults make 1.83 million parameters, 3.7 MB in float16."""

    vocab_size: int = 258
    hidden_size: int = 192
    intermediate_size: int = 448
    num_layers: int = 5
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    context_tokens: int = 8192


class TinyLlama(nn.Module):
    """Causal language model with tied embeddings."""

    def __init__(self, shape: TinyLlamaShape) -> None:
        """Create the model with random weights."""
        super().__init__()
        self.shape = shape
        self.model = _Decoder(shape)
        scale = 0.02
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # What writes to the residual stream starts smaller, as in GPT-2.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                shrink = (2 * shape.num_layers) ** -0.5 if writes else 1.0
                nn.init.normal_(parameter, std=scale * shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits.

        Args:
            tokens: (batch, length) int64.

        Returns:
            (batch, length, vocab_size).
        """
        hidden: Tensor = self.model(tokens)
        return functional.linear(hidden, self.model.embed_tokens.weight)


class _Decoder(nn.Module):
    def __init__(self, shape: TinyLlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([_Layer(shape) for _ in range(shape.num_layers)])
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        cos, sin = _rotations(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        cos = self.get_buffer("cos")[:length]
        sin = self.get_buffer("sin")[:length]
        hidden: Tensor = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        normed: Tensor = self.norm(hidden)
        return normed


class _Layer(nn.Module):
    def __init__(self, shape: TinyLlamaShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = _Mlp(shape)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class _Attention(nn.Module):
    def __init__(self, shape: TinyLlamaShape) -> None:
        super().__init__()
        self.shape = shape
        query_size = shape.num_heads * shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        heads = (batch, length, -1, self.shape.head_dim)
        query = _rotate(self.q_proj(hidden).view(heads).transpose(1, 2), cos, sin)
        key = _rotate(self.k_proj(hidden).view(heads).transpose(1, 2), cos, sin)
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        group = self.shape.num_heads // self.shape.num_kv_heads
        mixed = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, dim=1),
            value.repeat_interleave(group, dim=1),
            is_causal=True,
        )
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class _Mlp(nn.Module):
    def __init__(self, shape: TinyLlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(
            functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)
        )
        return output


def _rotations(shape: TinyLlamaShape) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = shape.rope_theta**-exponents
    angles = torch.outer(torch.arange(shape.context_tokens, dtype=torch.float32), frequencies)
    doubled = torch.cat([angles, angles], dim=-1)
    return doubled.cos(), doubled.sin()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (heads * cos + turned * sin).to(heads.dtype)
