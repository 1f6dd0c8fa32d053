"""What may stay in a cache of fixed size, as options say it."""

from __future__ import annotations

from edgekv.cache.policies.named import policy_named
from edgekv.cache.policies.names import LAYER_BUDGETS, LayerBudgets
from edgekv.documents import Document
from edgekv.errors import InputError

SINKS = 4  # first tokens, on which attention leans (arXiv 2309.17453)
RECENT = 128
SLICE = 512


class Eviction(Document, frozen=True):
    """A cache of fixed size: which rows stay, and how many.

    Attributes:
        policy: a name of edgekv.cache.policies.named.
        budget: rows that are left after an eviction.
        slice_size: tokens of a prompt between two evictions; the cache holds budget + slice_size rows.
        every: tokens decoded between two evictions.
        sinks: first rows that stay whatever the policy says.
        recent: last rows that stay; never more than half of the budget.
        layers: how the budget is spread over layers; others than "uniform" want room for twice of it in each.
    """

    policy: str
    budget: int
    slice_size: int = SLICE
    every: int = 128
    sinks: int = SINKS
    recent: int = RECENT
    layers: LayerBudgets = "uniform"

    @property
    def n_cells(self) -> int:
        """Rows that the cache has to have room for."""
        most = self.budget if self.layers == "uniform" else 2 * self.budget
        return most + max(self.slice_size, self.every)


def wanted_eviction(
    budget: int | None, policy: str, layers: LayerBudgets = "uniform", slice_size: int = SLICE
) -> Eviction | None:
    """What options ask for; without a budget nothing is evicted.

    Raises:
        InputError: the budget is impossible, or the policy unknown.
    """
    if budget is None:
        return None
    eviction = Eviction(policy, budget, slice_size, layers=layers)
    require_possible(eviction)
    return eviction


def require_possible(eviction: Eviction) -> None:
    """Raise InputError, naming the option, unless an eviction can be done."""
    policy_named(eviction.policy)
    least = 4 * max(eviction.sinks, 4)
    if eviction.budget < least:
        raise InputError(f"a budget of {eviction.budget} tokens is too small; it must be at least {least}")
    if eviction.layers not in LAYER_BUDGETS:
        known = ", ".join(LAYER_BUDGETS)
        raise InputError(f"budgets over layers cannot be {eviction.layers!r}; there are {known}")
    for name in ("slice_size", "every", "recent"):
        if getattr(eviction, name) < 1:
            raise InputError(f"{name} is {getattr(eviction, name)}; it must be at least 1")
