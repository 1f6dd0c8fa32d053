"""Text sampled from the teacher for training: more of a corpus's kind, or all of it for users without one.

A plain sequence begins with some tokens of the corpus, or with one random token where there is none (LLM-QAT,
arXiv 2305.17888, section 2.1). The others are chats in the model's own template: when an answer ends, the next
question of edgekv.text.chats follows. Everything else is drawn from the teacher at temperature 1, so the text is what
the student must imitate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from edgekv.text.shards import Shard

CPU_SEQUENCES = 32
MEMORY_SHARE = 0.6  # of a GPU's free memory for the cache; logits and their noise take most of the rest
OPENING_TOKENS = 32


def opening(shards: Sequence[Shard], n_tokens: int, rng: np.random.Generator) -> list[int]:
    """Up to `n_tokens` tokens from a random place of the texts, each text as likely as it is long."""
    sizes = np.array([len(shard.tokens) for shard in shards])
    tokens = shards[int(rng.choice(len(shards), p=sizes / sizes.sum()))].tokens
    start = int(rng.integers(max(1, len(tokens) - n_tokens)))
    return [int(token) for token in tokens[start : start + n_tokens]]


def write_text(
    source: TensorSource,
    openings: Iterator[list[int]],
    chat: Chat | None,
    chat_every: int,
    shape: tuple[int, int],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> NDArray[np.int64]:
    """Sample `shape` = (sequences, length) tokens from the teacher.

    Args:
        openings: the first tokens of each plain sequence.
        chat: the model's chats, one of `chat_every` sequences; without it all are plain.
        progress: counts tokens.
    """
    n_sequences, length = shape
    writer = Writer(source, length, device)
    generator = torch.Generator(device).manual_seed(seed)
    at_once = writer.sequences_at_once()
    batches = []
    for start in range(0, n_sequences, at_once):
        numbers = range(start, min(start + at_once, n_sequences))
        talk = [chat is not None and number % chat_every == chat_every - 1 for number in numbers]
        first = [chat.next() if chat and t else next(openings) for t in talk]

        def written(position: int, before: int = start * length, n: int = len(numbers)) -> None:
            progress(before + position * n, n_sequences * length)

        batches.append(writer.write(first, chat, generator, written))
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
        return max(
            1, int(torch.cuda.mem_get_info(self.device)[0] * MEMORY_SHARE) // (per_token * self.length)
        )

    @without_gradient
    def write(
        self,
        first: Sequence[Sequence[int]],
        chat: Chat | None,
        generator: torch.Generator,
        written: Callable[[int], None],
    ) -> NDArray[np.int64]:
        """Sample (len(first), length) tokens; row i begins with first[i].

        After a token that ends a turn the next question of `chat` is put in. `written` hears of each position.
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
            written(position + 1)
            logits = self.step(torch.from_numpy(drawn).to(self.device), cache, position)
            noise = torch.empty_like(logits).exponential_(generator=generator)
            drawn = (logits - noise.log()).argmax(-1).cpu().numpy()  # Gumbel-max: a draw from the softmax
        return out

    def step(self, tokens: Tensor, cache: Tensor, position: int) -> Tensor:
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
        # The query heads of one KV head stand as rows of one matrix, so that a cached row is read once. A new length
        # at every token: cuDNN would plan each anew.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            mixed = F.scaled_dot_product_attention(
                query[:, 0].unflatten(1, (self.spec.n_kv_heads, -1)),
                keys[:, : position + 1].transpose(1, 2),
                values[:, : position + 1].transpose(1, 2),
            )
        return F.linear(mixed.flatten(1)[:, None], w.output)
