"""Recipe and record of a healing: how a model was trained and what came of it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgekv.errors import InputError
from edgekv.spec import MLA, RopeSpec

CacheType = Literal["f16", "q8_0", "q5_0", "q4_0"]


@dataclass(frozen=True)
class HealRecipe:
    """Everything that decides the outcome of a training run, apart from the models and the data.

    Phase 1 (`match_share` of the steps) matches each layer's attention output on the teacher's own inputs;
    phase 2 minimises KL(teacher || student) on the logits. Each phase has its own learning-rate cycle.

    A student that only sees short sequences fails at distances it never met; one that only sees long ones
    forgets the start of a context, which is a small share of their tokens. With `short_len` the steps take turns.
    """

    steps: int
    seed: int = 0
    batch_tokens: int = 32768
    seq_len: int = 1024
    short_len: int | None = None  # on every second step, train on pieces of this many tokens
    lr: float = 2e-3
    match_share: float = 0.05
    cache_type: CacheType = "f16"  # all but f16 are simulated: its rounding is far below the noise

    @property
    def match_steps(self) -> int:
        """Steps of phase 1."""
        return round(self.match_share * self.steps)

    @property
    def batch_sequences(self) -> int:
        """Sequences in one step."""
        return max(1, self.batch_tokens // self.seq_len)


@dataclass(frozen=True)
class Evaluation:
    """The student against the float32 teacher on held-out windows."""

    step: int
    ppl: float
    teacher_ppl: float
    kl: float  # nats per token, KL(teacher || student)
    argmax_agreement: float
    tokens_scored: int


@dataclass(frozen=True)
class TrainingStep:
    """Where a training is; sent every few seconds."""

    step: int
    steps: int
    phase: int
    loss: float
    lr: float
    tokens_per_s: float
    eta_s: float


@dataclass(frozen=True)
class CurvePoint:
    """Training loss, mean since the point before: phase 1 relative squared error, phase 2 KL in nats."""

    step: int
    phase: int
    loss: float


@dataclass(frozen=True)
class DataRecord:
    """One text that was trained on."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class HealedRecord:
    """What a file of healed weights says about itself."""

    format: int
    base_name: str
    base_sha256: str  # of the original GGUF
    n_heads: int
    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    rope_theta: float
    recipe: HealRecipe
    steps_done: int
    data: tuple[DataRecord, ...]
    evaluation_text: str
    evaluations: tuple[Evaluation, ...]
    curve: tuple[CurvePoint, ...]
    made_with: str  # versions and device
    earlier: HealedRecord | None = None  # the training that this one began from, if any

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on, earlier trainings included."""
        before = self.earlier.tokens_seen if self.earlier else 0
        return before + self.steps_done * self.recipe.batch_tokens

    @property
    def attention(self) -> MLA:
        """The student's attention."""
        rope = RopeSpec(self.rope_theta, self.rope_dim)
        return MLA(self.n_heads, self.kv_lora_rank, self.nope_dim, self.value_dim, rope)


# Choices that records of older files hold, and what every training does instead of choosing.
RETIRED: Mapping[str, Any] = {
    "warmup": 50,
    "schedule": "cosine",
    "decay_share": 0.3,
    "lr_floor": 0.0,
    "grad_clip": 1.0,
    "optimizer": "muon",
    "train": "attn+norms",
}


def drop_retired(record: dict[str, Any], path: Path) -> None:
    """Take the RETIRED choices out of a record's JSON, read from `path`, and out of the earlier trainings in it.

    Raises:
        InputError: one of them is not what every training now does.
    """
    recipe = record["recipe"] = dict(record["recipe"])
    for name, value in RETIRED.items():
        if (found := recipe.pop(name, value)) != value:
            raise InputError(
                f"{path} was healed with {name} {found!r}, this EdgeKV heals with {value!r} alone; heal again"
            )
    if record.get("earlier"):
        drop_retired(record["earlier"], path)
