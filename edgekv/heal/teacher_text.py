"""Text sampled from the teacher for training, for users without a corpus.

Half of the sequences begin with a random token (LLM-QAT, arXiv 2305.17888, section 2.1), half are chats in
the model's own template: when an answer ends, the next question of edgekv.text.chats follows.
Everything else is drawn from the teacher at temperature 1, so the text is what the student must imitate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgekv.heal.teacher_student import load_teacher
from edgekv.heal.torch_blocks import (
    GQAWeights,
    Rope,
    gqa_heads,
    rms_norm,
    rope_tables,
    swiglu,
    without_gradient,
)
from edgekv.progress import Progress
from edgekv.source import TensorSource
from edgekv.spec import GQA
from edgekv.text.chats import Chat

CPU_SEQUENCES = 32


def write_text(
    source: TensorSource,
    openings: NDArray[np.int64],
    chat: Chat | None,
    n_sequences: int,
    length: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> NDArray[np.int64]:
    """Sample (n_sequences, length) tokens from the teacher.

    Args:
        openings: tokens that a plain sequence may begin with.
        chat: the model's chats, every second sequence; without it all are plain.
    """
    writer = Writer(source, length, device)
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    at_once = writer.sequences_at_once()
    batches = []
    for start in range(0, n_sequences, at_once):
        numbers = range(start, min(start + at_once, n_sequences))
        talk = [chat is not None and number % 2 == 1 for number in numbers]
        first = [chat.next() if chat and t else [int(rng.choice(openings))] for t in talk]
        batches.append(writer.write(first, chat, generator))
        progress(numbers[-1] + 1, n_sequences)
    return np.concatenate(batches)


class Writer:
    """Samples batches of sequences with a KV cache, one token of every sequence per step."""

    def __init__(self, source: TensorSource, length: int, device: torch.device) -> None:
        attention = source.spec.layers[0].attention
        assert isinstance(attention, GQA)
        self.spec, self.eps, self.length, self.device = attention, source.spec.norm_eps, length, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.weights = load_teacher(source, device, self.dtype)
        self.embedding = torch.tensor(source.load("token_embd.weight"), dtype=self.dtype, device=device)
        self.head = self.embedding
        if not source.spec.tied_embeddings:
            self.head = torch.tensor(source.load("output.weight"), dtype=self.dtype, device=device)
        self.norm = torch.tensor(source.load("output_norm.weight"), device=device)
        self.rope = rope_tables(length, attention.rope.theta, attention.rope.dim, device)

    def sequences_at_once(self) -> int:
        """As many as leave half of the device's free memory; a fixed few on a CPU."""
        if self.device.type != "cuda":
            return CPU_SEQUENCES
        per_token = 2 * len(self.weights) * self.spec.cache_values
        return max(1, int(torch.cuda.mem_get_info(self.device)[0] * 0.5) // (per_token * self.length))

    @without_gradient
    def write(
        self, first: Sequence[Sequence[int]], chat: Chat | None, generator: torch.Generator
    ) -> NDArray[np.int64]:
        """Sample (len(first), length) tokens; row i begins with first[i].

        After a token that ends a turn the next question of `chat` is put in.
        """
        n, a = len(first), self.spec
        shape = (len(self.weights), 2, n, self.length, a.n_kv_heads, a.head_dim)
        cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        given = [list(row) for row in first]
        out = np.zeros((n, self.length), np.int64)
        drawn = np.zeros(n, np.int64)
        for position in range(self.length):
            for i, queue in enumerate(given):
                if queue:
                    drawn[i] = queue.pop(0)
                elif chat is not None and drawn[i] in chat.ends:
                    queue.extend(chat.next())
            out[:, position] = drawn
            logits = self._step(torch.from_numpy(drawn).to(self.device), cache, position)
            noise = torch.empty_like(logits).exponential_(generator=generator)
            drawn = (logits - noise.log()).argmax(-1).cpu().numpy()  # Gumbel-max: a draw from the softmax
        return out

    def _step(self, tokens: Tensor, cache: Tensor, position: int) -> Tensor:
        """Append one token of every sequence; logits (B, vocab) in float32."""
        rope = Rope(*(table[position : position + 1] for table in self.rope))
        x = self.embedding[tokens][:, None]
        for weights, layer in zip(self.weights, cache, strict=True):
            normed = rms_norm(x, weights.attn_norm, self.eps, self.dtype)
            x = x + self._attend(normed, weights, layer, rope, position)
            normed = rms_norm(x, weights.ffn_norm, self.eps, self.dtype)
            x = x + swiglu(normed, weights.gate_up, weights.down)
        return F.linear(rms_norm(x[:, 0], self.norm, self.eps, self.dtype), self.head).float()

    def _attend(self, x: Tensor, w: GQAWeights, cache: Tensor, rope: Rope, position: int) -> Tensor:
        query, key, value = gqa_heads(x, w, rope, self.spec)
        keys, values = cache
        keys[:, position], values[:, position] = key[:, 0], value[:, 0]
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys[:, : position + 1].transpose(1, 2),
            values[:, : position + 1].transpose(1, 2),
            enable_gqa=self.spec.n_heads != self.spec.n_kv_heads,
        )
        return F.linear(mixed.transpose(1, 2).flatten(-2), w.output)
