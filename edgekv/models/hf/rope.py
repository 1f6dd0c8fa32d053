"""Rotary embeddings as config.json describes them, in `rope_parameters` (transformers 5) or `rope_scaling`.

Formulas: transformers src/transformers/modeling_rope_utils.py.
"""

from __future__ import annotations

from math import log, pi, sqrt

from edgekv.models.hf.config_fields import ConfigFields
from edgekv.spec import RopeLayout, RopeSpec, Yarn


def read_rope(
    config: ConfigFields, dim: int, layout: RopeLayout, kind: str = "", default_theta: float = 1e4
) -> RopeSpec:
    """The rotary embedding of all layers, or of those whose layer type is `kind`.

    Raises:
        ModelFileError: a field is missing or impossible.
        UnsupportedError: the scaling is of a kind that EdgeKV does not compute.
    """
    if dim % 2:
        config.fail("head_dim", "an even number")
    fields = config.inner("rope_parameters") or config.inner("rope_scaling")
    if fields and kind and (of_kind := fields.inner(kind)):
        fields = of_kind
    for part in (config, fields) if fields else (config,):
        part.require("partial_rotary_factor", (1, 1.0), "a rotary embedding of a part of each head")
    theta = config.number("rope_theta", default_theta)
    if not fields:
        return RopeSpec(theta, dim, layout)
    theta = fields.number("rope_theta", theta)
    scaling = str(fields.values.get("rope_type") or fields.values.get("type") or "default")
    if scaling == "default":
        return RopeSpec(theta, dim, layout)
    if scaling == "linear":
        return RopeSpec(theta, dim, layout, (fields.number("factor"),) * (dim // 2))
    if scaling == "llama3":
        return RopeSpec(theta, dim, layout, _llama3_factors(fields, theta, dim))
    if scaling == "yarn":
        return _yarn(config, fields, RopeSpec(theta, dim, layout))
    if scaling in ("longrope", "su"):
        return _longrope(config, fields, RopeSpec(theta, dim, layout))
    return fields.unsupported(f"RoPE scaling {scaling!r}")


def trained_context(config: ConfigFields) -> int:
    """Tokens within which one set of frequencies holds: LongRoPE has a second one beyond, which nobody
    mixes with the first in one cache."""
    context = config.integer("max_position_embeddings")
    fields = config.inner("rope_parameters") or config.inner("rope_scaling")
    if fields and fields.values.get("rope_type", fields.values.get("type")) in ("longrope", "su"):
        if fields.values.get("long_factor") == fields.values.get("short_factor"):
            return context
        return min(context, _original_context(config, fields))
    return context


def attention_scale_of_yarn(config: ConfigFields) -> float:
    """DeepSeek's factor on the scores, mscale(mscale_all_dim)^2; 1 without YaRN."""
    fields = config.inner("rope_parameters") or config.inner("rope_scaling")
    if not fields or not fields.values.get("mscale_all_dim"):
        return 1.0
    return _mscale(fields.number("factor"), fields.number("mscale_all_dim")) ** 2


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def _llama3_factors(fields: ConfigFields, theta: float, dim: int) -> tuple[float, ...]:
    """Llama 3's scaling: slow pairs divided by `factor`, fast ones kept, a ramp in wavelengths between."""
    factor = fields.number("factor")
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    original = fields.integer("original_max_position_embeddings")
    if not high > low:
        fields.fail("high_freq_factor", f"a number above low_freq_factor, {low:g},")
    factors = []
    for pair in range(dim // 2):
        turns = original * theta ** (-2 * pair / dim) / (2 * pi)  # within the original context
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / (kept + (1 - kept) / factor))
    return tuple(factors)


def _yarn(config: ConfigFields, fields: ConfigFields, plain: RopeSpec) -> RopeSpec:
    fields.require("truncate", (True,), "YaRN without rounded ramp bounds")
    factor, original = fields.number("factor"), _original_context(config, fields)
    if fields.values.get("attention_factor") is not None:
        magnitude = fields.number("attention_factor")
    elif fields.values.get("mscale") and fields.values.get("mscale_all_dim"):
        all_dim = _mscale(factor, fields.number("mscale_all_dim"))
        magnitude = _mscale(factor, fields.number("mscale")) / all_dim
    else:
        magnitude = _mscale(factor)
    yarn = Yarn(factor, original, fields.number("beta_fast", 32.0), fields.number("beta_slow", 1.0))
    return RopeSpec(plain.theta, plain.dim, plain.layout, (), yarn, magnitude)


def _longrope(config: ConfigFields, fields: ConfigFields, plain: RopeSpec) -> RopeSpec:
    factors = fields.numbers("short_factor", plain.dim // 2)
    fields.numbers("long_factor", plain.dim // 2)
    original = _original_context(config, fields)
    factor = fields.number("factor", config.integer("max_position_embeddings") / original)
    implied = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
    magnitude = fields.number("attention_factor", implied)
    return RopeSpec(plain.theta, plain.dim, plain.layout, factors, None, magnitude)


def _original_context(config: ConfigFields, fields: ConfigFields) -> int:
    default = config.values.get("original_max_position_embeddings")
    context = default or config.integer("max_position_embeddings")
    return fields.integer("original_max_position_embeddings", context)
