"""How a model is healed, as frozen numbers; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Train = Literal["attn", "attn+norms", "all"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run, apart from the models and the data.

    Phase 1 (`match_share` of the steps) matches each layer's attention output on the teacher's own inputs;
    phase 2 minimises KL(teacher || student) on the logits. Each phase has its own learning-rate cycle.
    """

    steps: int
    seed: int = 0
    batch_tokens: int = 32768
    seq_len: int = 1024
    lr: float = 4e-4
    match_share: float = 0.15
    warmup: int = 50
    schedule: Literal["wsd", "cosine"] = "cosine"
    decay_share: float = 0.3
    lr_floor: float = 0.0
    grad_clip: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    train: Train = "attn"
    cache_type: Literal["q8_0", "q4_0"] | None = None

    @property
    def match_steps(self) -> int:
        """Steps of phase 1."""
        return round(self.match_share * self.steps)

    @property
    def batch_sequences(self) -> int:
        """Sequences in one step."""
        return max(1, self.batch_tokens // self.seq_len)
