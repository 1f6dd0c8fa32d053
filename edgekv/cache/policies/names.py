"""Names of policies that options show before anything heavy is imported."""

from __future__ import annotations

from typing import Literal, get_args

DEFAULT_POLICY = "keydiff"  # all engines can show it what it needs
LayerBudgets = Literal["uniform", "pyramid", "entropy"]
LAYER_BUDGETS: tuple[LayerBudgets, ...] = get_args(LayerBudgets)
