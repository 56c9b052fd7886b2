"""A LLaMA in numpy, of the tensors of a plain model: what an exported file must compute. Nothing here is lonas's own code.

The rotary positions turn either the two halves of a head (Hugging Face's rows) or neighbours (llama.cpp's rows, as
ggml_rope does for the architectures `llama` and `deci`), so that the order of the rows is checked as well.
"""

import numpy as np


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotated(x, theta, neighbours):
    """`x (T, heads, D)`"""
    tokens, _, size = x.shape
    angles = np.arange(tokens)[:, None] / theta ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., : size // 2], x[..., size // 2 :])
    turned = first * cos - second * sin, second * cos + first * sin
    if neighbours:
        return np.stack(turned, -1).reshape(x.shape)
    return np.concatenate(turned, -1)


def attention(q, k, v):
    """Causal; q `(T, heads, D)`, k and v `(T, key heads, D)`."""
    tokens, heads, size = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(tokens, heads * size)


def logits(tensors, sizes, tokens, neighbours):
    """`(T, V)`: `tensors` by Hugging Face's names; `sizes` has layers, heads, kv_heads, head, eps, theta: heads for all layers or by layer."""
    tensors = {name: np.asarray(t, np.float64) for name, t in tensors.items()}
    embedding = tensors["model.embed_tokens.weight"]
    x = embedding[tokens]
    for layer in range(sizes["layers"]):
        count = lambda key: sizes[key][layer] if isinstance(sizes[key], list) else sizes[key]
        of = lambda name: tensors[f"model.layers.{layer}.{name}.weight"]
        linear = lambda x, name: x @ of(name).T + tensors.get(f"model.layers.{layer}.{name}.bias", 0.0)
        h = norm(x, of("input_layernorm"), sizes["eps"])
        split = lambda name, heads: linear(h, f"self_attn.{name}_proj").reshape(len(tokens), heads, sizes["head"])
        q, k = (rotated(split(n, h), sizes["theta"], neighbours) for n, h in (("q", count("heads")), ("k", count("kv_heads"))))
        x = x + linear(attention(q, k, split("v", count("kv_heads"))), "self_attn.o_proj")
        h = norm(x, of("post_attention_layernorm"), sizes["eps"])
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    head = tensors.get("lm_head.weight", embedding)
    return norm(x, tensors["model.norm.weight"], sizes["eps"]) @ head.T
