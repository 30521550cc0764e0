"""GPT-2 once more, in NumPy and as plainly as possible: what the tests compare the library with.

Written after OpenAI's own code (src/model.py of github.com/openai/gpt-2). It reads the published
tensors by their published names, and shares nothing with gpt2mini. One text, no padding, float64.
"""

import numpy as np


def gpt2_logits(token_ids, weights, n_heads):  # (tokens), {name: array} -> (tokens, vocab)
    weights = {name.removeprefix("transformer."): w.astype("f8") for name, w in weights.items()}
    x = weights["wte.weight"][token_ids] + weights["wpe.weight"][: len(token_ids)]  # (tokens, emb)
    n_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("h."))
    for layer in range(n_layers):
        block = f"h.{layer}."
        x = x + attention(layer_norm(x, weights, block + "ln_1"), weights, block + "attn", n_heads)
        x = x + mlp(layer_norm(x, weights, block + "ln_2"), weights, block + "mlp")
    hidden = layer_norm(x, weights, "ln_f")  # (tokens, emb)
    return hidden @ weights.get("lm_head.weight", weights["wte.weight"]).T


def attention(x, weights, name, n_heads):  # (tokens, emb) -> (tokens, emb)
    query, key, value = np.split(linear(x, weights, name + ".c_attn"), 3, axis=1)  # (tokens, emb)
    future = np.triu(np.ones((len(x), len(x)), dtype=bool), k=1)  # True above the diagonal
    outputs = []
    heads = [np.split(part, n_heads, axis=1) for part in (query, key, value)]
    for q, k, v in zip(*heads, strict=True):  # (tokens, head_dim)
        scores = q @ k.T / np.sqrt(q.shape[1])  # (tokens, tokens)
        outputs.append(softmax(np.where(future, -np.inf, scores)) @ v)  # (tokens, head_dim)
    return linear(np.concatenate(outputs, axis=1), weights, name + ".c_proj")


def mlp(x, weights, name):  # (tokens, emb) -> (tokens, emb)
    return linear(gelu(linear(x, weights, name + ".c_fc")), weights, name + ".c_proj")


def linear(x, weights, name):  # the published layout is (in, out)
    return x @ weights[name + ".weight"] + weights[name + ".bias"]


def layer_norm(x, weights, name):
    centered = x - x.mean(axis=1, keepdims=True)
    variance = (centered**2).mean(axis=1, keepdims=True)
    return centered / np.sqrt(variance + 1e-5) * weights[name + ".weight"] + weights[name + ".bias"]


def gelu(x):  # the tanh form of Hendrycks and Gimpel 2016, with which GPT-2 was trained
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
