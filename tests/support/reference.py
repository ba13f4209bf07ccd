"""A slow, plain reference of StreamingLLM, in float64 unless told otherwise, sharing no code with the product.

Keys are kept UN-rotated; at every step the positions 0 .. n-1 are assigned to what is in the cache and all keys are
rotated anew (arXiv:2309.17453, 3.2). Forward passes are written out from the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rotate_halves(x: Tensor, positions: Tensor, dims: int, theta: float) -> Tensor:
    """Rotate the first `dims` dimensions of (heads, n, head_dim)."""
    frequencies = theta ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = positions.double()[:, None] * frequencies[None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Reference:
    """Streams ids through a Llama or GPT-NeoX model with the token indices kept by a plain rule."""

    def __init__(self, model: Any, cache_size: int, num_sink_tokens: int, dtype: torch.dtype = torch.float64) -> None:
        self.cache_size, self.sinks = cache_size, num_sink_tokens
        self.weights: dict[str, Tensor] = {name: w.to(dtype) for name, w in model.state_dict().items()}
        self.config = model.config
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.kept: list[int] = []
        self.seen = 0

    def drop(self, first: int, count: int) -> None:
        """Drop `count` slots from slot `first` on."""
        keep = [i for i in range(len(self.kept)) if not first <= i < first + count]
        self.kept = [self.kept[i] for i in keep]
        self.keys = [k[:, keep] for k in self.keys]
        self.values = [v[:, keep] for v in self.values]

    def feed(self, ids: Tensor) -> Tensor:
        """Feed (n,) ids as one chunk, evicting before it what is due; logits (n, vocabulary)."""
        over = len(self.kept) + len(ids) - self.cache_size
        if over > 0:
            self.drop(self.sinks, over)
        self.kept += range(self.seen, self.seen + len(ids))
        self.seen += len(ids)
        return self._llama(ids) if self.config.model_type == "llama" else self._neox(ids)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dims: int, theta: float) -> Tensor:
        """q (heads, n, d), new k and v (kv_heads, n, d), all un-rotated; returns (n, heads * d)."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k], dim=1)
            self.values[layer] = torch.cat([self.values[layer], v], dim=1)
        keys, values = self.keys[layer], self.values[layer]
        length, new = keys.shape[1], q.shape[1]
        inside = torch.arange(length)
        keys = rotate_halves(keys, inside, dims, theta)
        q = rotate_halves(q, inside[-new:], dims, theta)
        groups = q.shape[0] // keys.shape[0]
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        scores = q @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])
        hidden = inside[None] > inside[-new:, None]
        scores = scores.masked_fill(hidden[None], float("-inf"))
        return (scores.softmax(-1) @ values).transpose(0, 1).reshape(new, -1)

    def _llama(self, ids: Tensor) -> Tensor:
        w, c = self.weights, self.config
        theta = c.rope_parameters["rope_theta"]
        dim = c.hidden_size // c.num_attention_heads

        def norm(x: Tensor, name: str) -> Tensor:
            scale: Tensor = (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()
            return w[name] * x / scale

        def heads(x: Tensor) -> Tensor:
            return x.view(len(ids), -1, dim).transpose(0, 1)

        x = w["model.embed_tokens.weight"][ids]
        for i in range(c.num_hidden_layers):
            p = f"model.layers.{i}."
            h = norm(x, p + "input_layernorm.weight")
            q, k, v = (heads(h @ w[f"{p}self_attn.{n}_proj.weight"].T) for n in "qkv")
            x = x + self._attend(i, q, k, v, dim, theta) @ w[p + "self_attn.o_proj.weight"].T
            h = norm(x, p + "post_attention_layernorm.weight")
            gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
            x = x + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
        return norm(x, "model.norm.weight") @ w["lm_head.weight"].T

    def _neox(self, ids: Tensor) -> Tensor:
        w, c = self.weights, self.config
        theta, heads = c.rope_parameters["rope_theta"], c.num_attention_heads
        dim = c.hidden_size // heads
        rotary = int(dim * c.rope_parameters["partial_rotary_factor"])

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[name + ".weight"].T + w[name + ".bias"]

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], c.layer_norm_eps)

        x = w["gpt_neox.embed_in.weight"][ids]
        for i in range(c.num_hidden_layers):
            p = f"gpt_neox.layers.{i}."
            qkv = linear(norm(x, p + "input_layernorm"), p + "attention.query_key_value")
            q, k, v = torch.split(qkv.view(len(ids), heads, 3 * dim).transpose(0, 1), dim, dim=-1)
            attention = linear(self._attend(i, q, k, v, rotary, theta), p + "attention.dense")
            h = F.gelu(linear(norm(x, p + "post_attention_layernorm"), p + "mlp.dense_h_to_4h"))
            x = x + attention + linear(h, p + "mlp.dense_4h_to_h")
        embed_out = w["embed_out.weight"] if "embed_out.weight" in w else w["lm_head.weight"]
        return norm(x, "gpt_neox.final_layer_norm") @ embed_out.T
