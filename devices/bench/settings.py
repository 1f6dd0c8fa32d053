"""Settings of a bench, their checks, and the names of its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekv.backends.open import Kind
from edgekv.cache.policies.names import DEFAULT_POLICY, LayerBudgets
from edgekv.cache.policies.settings import Eviction, wanted_eviction
from edgekv.errors import InputError
from edgekv.host.threads import allowed_cpus


@dataclass(frozen=True)
class Candidate:
    """One model file with one cache type."""

    path: Path
    cache_type: str = "f16"
    engine: Kind = "llama.cpp"


@dataclass(frozen=True)
class BenchSettings:
    """What to measure. `cpus` empty: the big physical cores; `threads` 0: one per CPU of these.

    With a `budget` every candidate's cache keeps that many tokens, by a `policy` of edgekv.cache.policies.named.
    """

    depths: tuple[int, ...] = (0, 512)
    n_prompt: int = 128
    n_gen: int = 32
    repeats: int = 5
    threads: int = 0
    cpus: tuple[int, ...] = ()
    context: int = 0
    with_hash: bool = True
    budget: int | None = None
    policy: str = DEFAULT_POLICY
    layers: LayerBudgets = "uniform"

    @property
    def n_ctx(self) -> int:
        """Tokens of context to open: what the deepest point needs, or `context` if that is more."""
        return max(self.context, max(self.depths) + max(self.n_prompt, self.n_gen))

    @property
    def eviction(self) -> Eviction | None:
        """What leaves the caches."""
        return wanted_eviction(self.budget, self.policy, self.layers)

    def n_cached(self, n_tokens: float) -> float:
        """Of so many tokens, those that a cache has."""
        return min(n_tokens, self.eviction.n_cells) if self.eviction else n_tokens


def labels(candidates: Sequence[Candidate]) -> list[str]:
    """A short unique name for each: the file's stem, the cache type, and a number if both repeat."""
    wanted = [f"{c.path.stem} {c.cache_type}" for c in candidates]
    return [
        name if wanted.count(name) == 1 else f"{name} #{wanted[:i].count(name) + 1}"
        for i, name in enumerate(wanted)
    ]


def check(candidates: Sequence[Candidate], settings: BenchSettings) -> None:
    """Raises InputError without candidates, or if a setting is out of range."""
    if not candidates:
        raise InputError("nothing to bench: name at least one model file")
    s = settings
    if not s.depths or min(s.depths) < 0 or list(s.depths) != sorted(set(s.depths)):
        raise InputError(f"depths {s.depths}: give whole numbers from 0, each once, in rising order")
    if min(s.n_prompt, s.n_gen, s.repeats) < 1:
        raise InputError("tokens to prefill, tokens to decode and repeats must each be at least 1")
    wanted_eviction(s.budget, s.policy, s.layers)
    if unknown := sorted(set(s.cpus) - set(allowed_cpus())):
        raise InputError(
            f"CPU {unknown[0]} is closed to this process; choose from {', '.join(map(str, allowed_cpus()))}"
        )
