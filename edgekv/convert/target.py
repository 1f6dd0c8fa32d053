"""Target of a conversion for llama.cpp: the latent shape for a share of the cache bytes, and why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edgekv.errors import InputError
from edgekv.spec import GQA, MLA, ModelSpec, RopeSpec

_ONNX = "convert it into an ONNX folder: name one after -o, without .gguf"
_TRIM = (
    f"{_ONNX}; or, if a shorter context will do, set max_position_embeddings to the window and sliding_window to "
    "null in config.json"
)
_AVOIDABLE = ("a sliding window", "layers that differ")  # some have windows, and the others have not
BIASES = "biases on queries, keys and values"
SCALED = "scaled RoPE frequencies"
LEAST_UNSCALED = 1 / 4  # of a head's pairs, for a conversion that gives the others up
_WHY: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # of ModelSpec.peculiarities: (why, what to do)
        "QK-norm": (
            "a deepseek2 graph makes keys of what it caches, and a norm behind that cannot be absorbed into queries",
            _ONNX,
        ),
        BIASES: (
            "a key's bias is rotated with the key, and a deepseek2 graph has no place for it",
            f"{_ONNX}; or edgekv convert --fold-biases writes them into the weights, nearly, and says how nearly",
        ),
        "a sliding window": ("a deepseek2 graph attends to all tokens", _TRIM),
        "attention softcapping": ("a deepseek2 graph does not cap scores", _ONNX),
        "layers without RoPE": ("a deepseek2 graph rotates in every layer", _ONNX),
        SCALED: (
            "a deepseek2 graph takes its frequencies from rope theta alone, or from YaRN",
            _ONNX,
        ),
        "experts": ("only attention in front of a dense feed-forward is converted", _ONNX),
    }
)


def unscaled_pairs(rope: RopeSpec) -> int:
    """How many of the fastest pairs turn as theta alone says: all of a plain RoPE, some of Llama 3's scaled one."""
    if rope.yarn or rope.magnitude != 1.0:
        return 0
    scaled = [j for j, factor in enumerate(rope.factors) if factor != 1.0]
    return scaled[0] if scaled else rope.dim // 2


def obstacle(spec: ModelSpec, fold_biases: bool = False, unscaled: bool = False) -> str | None:
    """Why the model cannot be converted for llama.cpp and what to do, or None if it can.

    fold_biases, unscaled: biases, and scaled frequencies of the slower pairs alone, are no obstacles. Those that a
    user can remove are named only where there are no others.
    """
    if isinstance(spec.layers[0].attention, MLA):
        return f"{spec.name} already has MLA; convert takes a GQA or MHA model"
    fine = {BIASES} if fold_biases else set()
    if unscaled and all(_mostly_plain(layer.attention.rope) for layer in spec.layers):
        fine.add(SCALED)
    found = [what for what in spec.peculiarities if what not in fine]
    if not found:
        return None
    lasting = [what for what in found if what not in _AVOIDABLE] or found
    name = next((name for name in _WHY if name in lasting), lasting[0])
    why, remedy = _WHY.get(name, ("a deepseek2 graph does not compute it", _ONNX))
    return f"{spec.name} has {name} and cannot become MLA in llama.cpp: {why}; {remedy}"


def _mostly_plain(rope: RopeSpec) -> bool:
    return unscaled_pairs(rope) >= LEAST_UNSCALED * rope.dim / 2


SIMD_STEP = 32  # values; a NEON step of f16, half an AVX-512 one: other widths fall into a scalar tail

DEFAULT_NOPE_DIM = 32  # query dims per head that read the latent: twice as many gain 4 % of the loss back


def rope_widths(gqa: GQA, healed: bool) -> tuple[int, ...]:
    """The rope key's widths, the better one first.

    Without training the full head dim: the latent cannot hold what RoPE turns. A model that will be healed learns to
    do with half (96+32 against 64+64 values: KL 0.143 and 0.190 after 13M tokens, 0.810 and 0.702 before), which
    leaves more of the cache to the latent. With scaled frequencies the key is as wide as the pairs that are not.
    """
    if not gqa.rope.is_plain:
        return (_unscaled_width(gqa),)
    full, half = gqa.rope.dim, gqa.rope.dim // 2
    return (half, full) if healed and half % SIMD_STEP == 0 else (full, half)


def _unscaled_width(gqa: GQA) -> int:
    """Dims of the pairs that are not scaled, rounded up to SIMD_STEP."""
    return min(gqa.rope.dim, -(-2 * unscaled_pairs(gqa.rope) // SIMD_STEP) * SIMD_STEP)


def choose_rank(gqa: GQA, keep: float, healed: bool = False) -> tuple[int, int]:
    """(kv_lora_rank, rope_dim) that keep at most `keep` of the cached values, in multiples of SIMD_STEP.

    The rope key gets the better of its widths as long as the latent is at least as wide.

    Raises:
        InputError: `keep` is not between 0 and 1, or leaves no room for a latent.
    """
    if not 0 < keep <= 1:
        raise InputError(f"--target is the share of the cache to keep, between 0 and 1; got {keep}")
    budget = int(gqa.cache_values * keep + 1e-9)
    for rope_dim in rope_widths(gqa, healed):
        rank = (budget - rope_dim) // SIMD_STEP * SIMD_STEP
        if rank >= rope_dim and rope_dim % SIMD_STEP == 0:
            return min(rank, max_rank(gqa)), rope_dim
    smallest = 2 * SIMD_STEP / gqa.cache_values
    raise InputError(
        f"--target {keep} keeps {budget} of {gqa.cache_values} values per token and layer, too few for a latent and "
        f"a rope key of {SIMD_STEP} values each; the smallest target for this model is {smallest:.3f}"
    )


def max_rank(gqa: GQA) -> int:
    """The rank at which the latent holds every key and value: more would store nothing new."""
    return 2 * gqa.n_kv_heads * gqa.head_dim


def target_spec(gqa: GQA, rank: int, rope_dim: int, nope_dim: int, value_dim: int) -> MLA:
    """The MLA shape for one layer, checked.

    A rope key narrower than the head keeps the fastest frequencies: with theta^(P/K) as its base, its ladder of
    P/2 speeds is the first P/2 of the original's K/2. The slow ones hardly turn and can live in the latent, and so
    must those that are scaled (edgekv.convert.target.unscaled_pairs): no ladder has them.

    Raises:
        InputError: a size is out of range; the message says which and what is possible.
    """
    if not 1 <= rank <= max_rank(gqa):
        raise InputError(f"--kv-lora-rank {rank} is not possible; this model takes 1 to {max_rank(gqa)}")
    most = rope_widths(gqa, healed=False)[0]
    if rope_dim % 2 or not 2 <= rope_dim <= most:
        raise InputError(f"--rope-dim {rope_dim} is not possible; it is even, from 2 to {most}")
    if not 1 <= nope_dim <= rank:
        raise InputError(f"--nope-dim {nope_dim} is not possible; it is from 1 to the rank, {rank}")
    if not 1 <= value_dim <= gqa.head_dim:
        raise InputError(
            f"--value-dim {value_dim} is not possible; it is from 1 to the head dim, {gqa.head_dim}"
        )
    theta = gqa.rope.theta ** (rope_dim / gqa.rope.dim)
    return MLA(gqa.n_heads, rank, nope_dim, value_dim, RopeSpec(theta, rope_dim))


def resolve_target(
    gqa: GQA,
    share: float | None,
    rank: int | None,
    rope_dim: int | None,
    nope_dim: int | None,
    value_dim: int | None = None,
    healed: bool = False,
) -> MLA:
    """The MLA shape that a user asked for, by a share of the cache or by sizes; None takes the default.

    Raises:
        InputError: neither or both were given, or a size is out of range.
    """
    if (share is None) == (rank is None):
        raise InputError("say how small: either --target SHARE or --kv-lora-rank RANK")
    if share is not None:
        rank, chosen = choose_rank(gqa, share, healed)
        rope_dim = chosen if rope_dim is None else rope_dim
    assert rank is not None
    return target_spec(
        gqa,
        rank,
        rope_widths(gqa, healed)[0] if rope_dim is None else rope_dim,
        min(DEFAULT_NOPE_DIM, rank) if nope_dim is None else nope_dim,
        gqa.head_dim if value_dim is None else value_dim,
    )
