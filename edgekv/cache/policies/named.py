"""Policies by the names that options have for them."""

from __future__ import annotations

from edgekv.cache.policies.base import Policy
from edgekv.cache.policies.critical import Critical
from edgekv.cache.policies.expected import ExpectedAttention
from edgekv.cache.policies.h2o import H2O
from edgekv.cache.policies.keydiff import KeyDiff
from edgekv.cache.policies.knorm import KNorm
from edgekv.cache.policies.snapkv import SnapKV
from edgekv.cache.policies.streaming import Streaming
from edgekv.cache.policies.tova import TOVA
from edgekv.errors import InputError

CRITICAL = "critical-"
_PLAIN: tuple[Policy, ...] = (Streaming(), KNorm(), KeyDiff(), SnapKV(), TOVA(), H2O(), ExpectedAttention())
_POLICIES = {policy.name: policy for plain in _PLAIN for policy in (plain, Critical(plain))}
POLICIES = tuple(_POLICIES)


def policy_named(name: str) -> Policy:
    """The policy of a name, such as "keydiff", or "critical-keydiff" for it within CriticalKV.

    Raises:
        InputError: there is none.
    """
    if name in _POLICIES:
        return _POLICIES[name]
    known = ", ".join(policy.name for policy in _PLAIN)
    raise InputError(f"there is no policy {name!r}; there are {known}, each with {CRITICAL} in front too")
