"""Balance of the channels of a latent cache row, so that one 8-bit scale suits all of them.

A row's scale is that of its largest value, and rope keys are often several times larger than latents. Each
channel is divided by a factor in the weights that write it and multiplied in those that read it, which
changes nothing in exact arithmetic. Factors are the square roots of the channels' sizes, times one for the
latents and one for the rope key that make both parts equally large: measured on SmolLM2-135M at 64 + 64
dims, KL 0.0018 without, 0.0010 with channels made equal, 0.0005 with their square roots.
"""

from __future__ import annotations

import numpy as np

from edgekv.cache.store import KVCache
from edgekv.reference.model import BlockWeights, block_forward
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA
from edgekv.tokenizer.tokenizer import Tokenizer

MAX_TOKENS = 128
TEXT = (  # any text does: only the sizes of its activations are used
    "The harbour lay quiet when the first boat came in. Its crew had been out for nine days, and the hold was "
    "full of mackerel; by noon the auction was over and 1,240 crates were on their way inland.\n\n"
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0\n\n"
    "User: How far is the Moon?\nAssistant: About 384,400 km on average, which light crosses in 1.3 seconds."
)


class RowBalance:
    """Follows a few tokens through the layers as they are exported, and rescales each layer's cache row."""

    def __init__(self, source: TensorSource) -> None:
        tokens = Tokenizer.from_metadata(source.metadata).encode(TEXT)[:MAX_TOKENS]
        self._spec = source.spec
        self._cache = _LastRows(source.spec, len(tokens))
        scale = np.float32(source.spec.embedding_scale)
        self._x = source.load("token_embd.weight")[np.asarray(tokens)] * scale

    def apply(self, w: BlockWeights, layer: int) -> None:
        """Rescale the weights of the next layer in place; layers come in order."""
        self._x = block_forward(self._x, w, self._spec, layer, self._cache)
        attention = self._spec.layers[layer].attention
        assert isinstance(attention, MLA)
        sizes = np.sqrt(np.mean(np.square(self._cache.rows), axis=0))  # (W,)
        divide_channels(w, attention, channel_factors(sizes, attention))


class _LastRows(KVCache):
    """A cache that shows the rows (S, W) that were appended last."""

    rows: Array

    def append(self, layer: int, k: Array, v: Array | None) -> tuple[Array, Array]:
        keys, values = super().append(layer, k, v)
        self.rows = keys[0]
        return keys, values


def channel_factors(sizes: Array, spec: MLA) -> Array:
    """What to divide each channel by, (W,), given its root mean square; the two dims of a rope pair share one."""
    latent, rope = sizes[: spec.kv_lora_rank], sizes[spec.kv_lora_rank :]
    if not rope.size:
        return _factors(latent)
    shape, axis = ((-1, 2), 1) if spec.rope.layout == "interleaved" else ((2, -1), 0)
    pairs = np.sqrt(np.mean(np.square(rope.reshape(shape)), axis=axis, keepdims=True))
    rope = np.broadcast_to(pairs, rope.reshape(shape).shape).reshape(-1)
    return np.concatenate([_factors(part) for part in (latent, rope)])


def _factors(sizes: Array) -> Array:
    """Square roots of sizes, times what brings the mean square of the divided channels to 1."""
    sizes = np.maximum(sizes, np.float32(1e-3) * sizes.max() + np.float32(1e-30))
    return np.asarray(np.sqrt(sizes) * np.sqrt(np.mean(sizes)), dtype=np.float32)


def divide_channels(w: BlockWeights, spec: MLA, factors: Array) -> None:
    """Divide the channels of the cached row by factors (W,), and multiply them back where they are read."""
    latent, rope = factors[: spec.kv_lora_rank], factors[spec.kv_lora_rank :]
    if spec.encoder:
        w["attn_kv_enc.weight"] = w["attn_kv_enc.weight"] / factors[:, None]
        w["attn_kv_enc.bias"] = w["attn_kv_enc.bias"] / factors
        w["attn_q_map.weight"] = w["attn_q_map.weight"] * factors[None, :, None]
        w["attn_v_b.weight"] = w["attn_v_b.weight"] * latent[None, None, :]
        return
    w["attn_kv_a_norm.weight"] = w["attn_kv_a_norm.weight"] / latent
    w["attn_k_b.weight"] = w["attn_k_b.weight"] * latent[None, :, None]
    w["attn_v_b.weight"] = w["attn_v_b.weight"] * latent[None, None, :]
    kv_a = w["attn_kv_a_mqa.weight"].copy()
    kv_a[spec.kv_lora_rank :] /= rope[:, None]
    w["attn_kv_a_mqa.weight"] = kv_a
    name = "attn_q.weight" if "attn_q.weight" in w else "attn_q_b.weight"
    by_head = w[name].reshape(spec.n_heads, spec.head_dim, -1).copy()
    by_head[:, spec.nope_dim :] *= rope[None, :, None]
    w[name] = by_head.reshape(w[name].shape)
