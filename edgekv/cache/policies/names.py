"""Names of policies that options show before anything heavy is imported."""

from __future__ import annotations

DEFAULT_POLICY = "keydiff"  # all engines can show it what it needs
