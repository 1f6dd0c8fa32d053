"""Rotary embeddings as config.json describes them, in `rope_parameters` (transformers 5) or `rope_scaling`.

Formulas: transformers src/transformers/modeling_rope_utils.py.
"""

from __future__ import annotations

from math import log, pi, sqrt

from edgekv.models.hf.config_fields import ConfigFields
from edgekv.spec import MAX_ROPE_DIM, RopeLayout, RopeSpec, Yarn


def read_rope(
    config: ConfigFields, dim: int, layout: RopeLayout, kind: str = "", default_theta: float = 1e4
) -> RopeSpec:
    """The rotary embedding of all layers, or of those whose layer type is `kind`.

    Raises:
        ModelFileError: a field is missing or impossible.
        UnsupportedError: the scaling is of a kind that EdgeKV does not compute.
    """
    if dim % 2 or dim > MAX_ROPE_DIM:
        config.fail("head_dim", f"an even number of at most {MAX_ROPE_DIM}")
    fields = _rope_fields(config, kind)
    for part in (config, fields) if fields else (config,):
        part.require("partial_rotary_factor", (1, 1.0), "a rotary embedding of a part of each head")
    outer = "rope_local_base_freq" if kind == "sliding_attention" else "rope_theta"
    theta = _theta(config, outer, default_theta)
    if not fields:
        return RopeSpec(theta, dim, layout)
    theta = _theta(fields, "rope_theta", theta)
    scaling = _scaling(fields)
    if scaling == "default":
        return RopeSpec(theta, dim, layout)
    if scaling == "linear":
        return RopeSpec(theta, dim, layout, (fields.number("factor"),) * (dim // 2))
    if scaling == "llama3":
        return RopeSpec(theta, dim, layout, _llama3_factors(config, fields, theta, dim))
    if scaling == "yarn":
        return _yarn(config, fields, RopeSpec(theta, dim, layout))
    if scaling in ("longrope", "su"):
        return _longrope(config, fields, RopeSpec(theta, dim, layout))
    return fields.unsupported(f"RoPE scaling {scaling!r}")


def _theta(fields: ConfigFields, name: str, default: float) -> float:
    """The base of the frequencies; below 1 they would grow from pair to pair, without bounds."""
    theta = fields.number(name, default)
    if theta < 1:
        fields.fail(name, "a number of at least 1")
    return theta


def trained_context(config: ConfigFields) -> int:
    """Tokens within which one set of frequencies holds: LongRoPE has a second one beyond, which nobody
    mixes with the first in one cache."""
    context = config.integer("max_position_embeddings")
    fields = _rope_fields(config)
    if fields and _scaling(fields) in ("longrope", "su"):
        if fields.values.get("long_factor") == fields.values.get("short_factor"):
            return context
        return min(context, _original_context(config, fields))
    return context


def attention_scale_of_yarn(config: ConfigFields) -> float:
    """DeepSeek's factor on the scores, mscale(mscale_all_dim)^2; 1 without YaRN."""
    fields = _rope_fields(config)
    if not fields or not fields.values.get("mscale_all_dim"):
        return 1.0
    return _mscale(fields.number("factor"), fields.number("mscale_all_dim")) ** 2


def _rope_fields(config: ConfigFields, kind: str = "") -> ConfigFields | None:
    """The fields of all layers' rotary embedding, or of a layer type's.

    Where both objects are there, transformers takes `rope_scaling` (PreTrainedConfig.convert_rope_params_to_dict),
    and in Gemma 3, whose `rope_parameters` has one object per layer type, both for the global layers.
    """
    new, old = config.inner("rope_parameters"), config.inner("rope_scaling")
    if config.optional("model_type") == "gemma3_text":
        return _of_layer_type(config, new, old, kind)
    for fields in (new, old):
        if fields and any(isinstance(value, dict) for value in fields.values.values()):
            config.unsupported("a rotary embedding for each layer type")
    if not (new and new.values and old and old.values):
        return old if old and old.values else new
    if "rope_theta" in new.values and "rope_theta" not in old.values:
        theta = new.number("rope_theta")
        if config.optional("rope_theta") != theta:
            config.malformed(
                f"rope_scaling stands beside rope_parameters, whose rope_theta, {theta:g}, it would replace",
                'write the scaling into rope_parameters, with "rope_type", and remove rope_scaling',
            )
    return old


def _of_layer_type(
    config: ConfigFields, new: ConfigFields | None, old: ConfigFields | None, kind: str
) -> ConfigFields | None:
    if new and any(not isinstance(value, dict | None) for value in new.values.values()):
        config.unsupported("rope_parameters that do not tell local and global layers apart")
    fields = new.inner(kind) if new and kind else None
    if not old or kind != "full_attention":
        return fields
    return ConfigFields({**(fields.values if fields else {}), **old.values}, config.path, old.prefix)


def _scaling(fields: ConfigFields) -> str:
    return str(fields.optional("rope_type") or fields.optional("type") or "default")


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def _llama3_factors(config: ConfigFields, fields: ConfigFields, theta: float, dim: int) -> tuple[float, ...]:
    """Llama 3's scaling: slow pairs divided by `factor`, fast ones kept, a ramp in wavelengths between."""
    factor = fields.number("factor")
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    original = _original_context(config, fields)
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
    if original < 2:
        fields.fail("original_max_position_embeddings", "more than one token")
    factor = fields.number("factor", config.integer("max_position_embeddings") / original)
    implied = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
    magnitude = fields.number("attention_factor", implied)
    return RopeSpec(plain.theta, plain.dim, plain.layout, factors, None, magnitude)


def _original_context(config: ConfigFields, fields: ConfigFields) -> int:
    """Tokens before scaling: the field outside goes before the one inside, as in transformers."""
    name = "original_max_position_embeddings"
    return config.integer(name, fields.integer(name, config.integer("max_position_embeddings")))
