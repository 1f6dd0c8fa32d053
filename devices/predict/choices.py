"""What a model could become: conversions, cache types and weight types, with their sizes in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgekv.convert.layers import convertible_attention
from edgekv.convert.target import choose_rank, target_spec
from edgekv.devices.predict.model_info import SizedSource, main_quantization
from edgekv.devices.predict.speed import Workload
from edgekv.errors import InputError
from edgekv.spec import ModelSpec
from edgekv.tensors import layer_tensor_shapes

KEEP = "keep"
TARGETS = (0.5, 1 / 3, 0.25)  # shares of the cache that a conversion may keep
CACHE_TYPES = ("f16", "q8_0", "q4_0")
WEIGHTS = (KEEP, "q8_0", "q4_0")
# An order of expected loss and no measure of it: near-lossless steps first, then half the latent, then what
# costs more. `edgekv eval` measures; these only say what to try first.
LOSS_ORDER = {
    **{"convert 1/2": 4, "convert 1/3": 8, "convert 1/4": 12},
    **{"cache q8_0": 1, "cache q4_0": 6, "weights q8_0": 1, "weights q4_0": 5},
}
# Bytes that a tensor takes when written as a weight type: (name, shape, type) -> bytes.
StoredNbytes = Callable[[str, tuple[int, ...], str], int]


@dataclass(frozen=True)
class Option:
    """One way to run a model.

    `keep` is the share of the cache that the conversion keeps, None without one; `steps` names what differs
    from the file at hand, and is empty for the file itself with an f16 cache.
    """

    spec: ModelSpec
    keep: float | None
    cache_type: str
    weights: str
    weights_nbytes: int
    read_nbytes: int
    quantization: str
    steps: tuple[str, ...]

    @property
    def loss_order(self) -> int:
        """Rank by expected loss: small is near the original."""
        return sum(LOSS_ORDER[step] for step in self.steps)

    @property
    def label(self) -> str:
        """Short description."""
        return ", ".join(self.steps) or "as it is"

    def workload(self) -> Workload:
        """What it asks of a machine a token."""
        spec = self.spec
        shapes = _shapes(spec)
        skipped = set() if spec.tied_embeddings else {"token_embd.weight"}
        matrices = [shape for name, shape in shapes.items() if len(shape) > 1 and name not in skipped]
        return Workload(
            n_layers=spec.n_layers,
            weight_flops=2.0 * sum(_count(shape) for shape in matrices),
            read_nbytes=self.read_nbytes,
            weights=self.quantization,
            cache_nbytes=spec.kv_bytes_per_token(self.cache_type),
            attention_flops=sum(layer.attention.flops_per_cached_token for layer in spec.layers),
            quantized_cache=self.cache_type not in ("f32", "f16", "bf16"),
            latent=spec.layers[0].attention.kind == "MLA",
        )


def option(
    source: SizedSource, keep: float | None, cache_type: str, weights: str, stored: StoredNbytes
) -> Option:
    """One option.

    Raises:
        UnsupportedError, InputError: the model cannot be converted so.
        ValueError: the cache type does not fit the dims.
    """
    spec = source.spec if keep is None else converted_spec(source.spec, keep)
    spec.kv_bytes_per_token(cache_type)
    sizes = {
        name: _tensor_nbytes(source, name, shape, keep, weights, stored)
        for name, shape in _shapes(spec).items()
    }
    skipped = 0 if spec.tied_embeddings else sizes["token_embd.weight"]
    steps = []
    if keep is not None:
        steps.append(f"convert 1/{round(1 / keep)}")
    if cache_type != "f16":
        steps.append(f"cache {cache_type}")
    if weights != KEEP:
        steps.append(f"weights {weights}")
    return Option(
        spec=spec,
        keep=keep,
        cache_type=cache_type,
        weights=weights,
        weights_nbytes=sum(sizes.values()),
        read_nbytes=sum(sizes.values()) - skipped,
        quantization=_own_quantization(source) if weights == KEEP else weights.upper(),
        steps=tuple(steps),
    )


def all_options(source: SizedSource, stored: StoredNbytes) -> list[Option]:
    """Every option that is possible for this model and does not enlarge it, by order of expected loss."""
    own = option(source, None, "f16", KEEP, stored)
    found = []
    for keep in (None, *_possible_targets(source.spec)):
        for weights in WEIGHTS:
            for cache_type in _possible_cache_types(
                source.spec if keep is None else converted_spec(source.spec, keep)
            ):
                made = option(source, keep, cache_type, weights, stored)
                if weights == KEEP or made.weights_nbytes < 0.95 * own.weights_nbytes:
                    found.append(made)
    return sorted(found, key=lambda made: made.loss_order)


def _possible_targets(spec: ModelSpec) -> list[float]:
    found = []
    for keep in TARGETS:
        try:
            converted_spec(spec, keep)
        except InputError:  # already MLA, or too few values for a latent
            continue
        found.append(keep)
    return found


def _possible_cache_types(spec: ModelSpec) -> list[str]:
    """Those whose blocks divide the rows."""
    found = []
    for cache_type in CACHE_TYPES:
        try:
            spec.kv_bytes_per_token(cache_type)
        except ValueError:
            continue
        found.append(cache_type)
    return found


def converted_spec(spec: ModelSpec, keep: float) -> ModelSpec:
    """The MLA spec that `edgekv convert --target keep` makes of a GQA model."""
    gqa = convertible_attention(spec)
    rank, rope_dim = choose_rank(gqa, keep)
    attention = target_spec(gqa, rank, rope_dim, min(32, rank), gqa.head_dim)
    return replace(
        spec, arch="deepseek2", layers=tuple(replace(layer, attention=attention) for layer in spec.layers)
    )


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.vocab, spec.dim),
        "output_norm.weight": (spec.dim,),
    }
    if not spec.tied_embeddings:
        shapes["output.weight"] = (spec.vocab, spec.dim)
    for i, layer in enumerate(spec.layers):
        block = layer_tensor_shapes(layer.attention, spec.dim, layer.ffn_dim)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def _tensor_nbytes(
    source: SizedSource,
    name: str,
    shape: tuple[int, ...],
    keep: float | None,
    weights: str,
    stored: StoredNbytes,
) -> int:
    """A tensor that is copied keeps its bytes; one that conversion computes is written as q8_0."""
    fitted = keep is not None and ".attn_" in name and not name.endswith("attn_norm.weight")
    if weights == KEEP and not fitted:
        return source.nbytes(name)
    return stored(name, shape, "q8_0" if weights == KEEP else weights)


def _own_quantization(source: SizedSource) -> str:
    return main_quantization(source, {name: source.nbytes(name) for name in source.names()})


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
