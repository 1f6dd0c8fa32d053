"""Options to make a model smaller: conversions, cache types and weight types, with their bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from operator import mul

from edgekv.backends.llama_cpp.footprint import seen_tokens
from edgekv.convert.layers import convertible_attention
from edgekv.convert.target import choose_rank, target_spec
from edgekv.devices.predict.model_info import main_quantization
from edgekv.devices.predict.speed import Workload
from edgekv.errors import InputError
from edgekv.export.gguf.write import stored_nbytes
from edgekv.quant.cache_format import CacheFormat
from edgekv.quant.formats import COMMON_CACHES, KEEP
from edgekv.source import SizedSource
from edgekv.spec import GQA, MLA, ModelSpec
from edgekv.tensors import model_tensor_shapes, read_nbytes, weight_flops

TARGETS = (0.5, 1 / 3, 0.25)  # shares of the cache that a conversion may keep
WEIGHTS = (KEEP, "q8_0", "q4_0")
# An order of expected loss and no measure of it, after BENCHMARKS.md: the model's own caches lose less than a
# conversion without healing. `edgekv eval` measures; these only say what to try first.
LOSS_ORDER = {
    **{"cache q8_0": 1, "cache q8_0/q4_0": 2, "cache q5_0/q4_0": 3, "cache q4_0": 4},
    **{"convert 1/2": 6, "convert 1/3": 10, "convert 1/4": 14},
    **{"weights q8_0": 1, "weights q4_0": 7},
}


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

    def workload(self, depth: int = 0) -> Workload:
        """Bytes and FLOPs per token; per cached token the mean over `depth` of them, as a window hides most."""
        spec = self.spec
        attentions = [layer.attention for layer in spec.layers]
        shares = [seen_tokens(spec, attention, depth) / depth if depth else 1 for attention in attentions]
        return Workload(
            n_layers=spec.n_layers,
            weight_flops=weight_flops(spec, model_tensor_shapes(spec)),
            read_nbytes=self.read_nbytes,
            weights=self.quantization,
            cache_nbytes=sum(map(mul, shares, (a.kv_bytes_per_token(self.cache_type) for a in attentions))),
            attention_flops=sum(map(mul, shares, (a.flops_per_cached_token for a in attentions))),
            cache_type=self.cache_type,
            cache_values=sum(map(mul, shares, (a.cache_values for a in attentions))),
            group=query_group(attentions[0]),
            latent=spec.layers[0].attention.kind == "MLA",
        )


def query_group(attention: GQA | MLA) -> int:
    """Query heads that share a cached row."""
    return attention.n_heads if isinstance(attention, MLA) else attention.n_heads // attention.n_kv_heads


def option(source: SizedSource, keep: float | None, cache_type: str, weights: str) -> Option:
    """One option.

    Raises:
        UnsupportedError, InputError: the model cannot be converted so.
        ValueError: the cache type does not fit the dims.
    """
    spec = source.spec if keep is None else converted_spec(source.spec, keep)
    cache_type = str(CacheFormat.parse(cache_type))
    spec.kv_bytes_per_token(cache_type)
    sizes = {
        name: _tensor_nbytes(source, name, shape, keep, weights)
        for name, shape in model_tensor_shapes(spec).items()
    }
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
        read_nbytes=read_nbytes(spec, sizes),
        quantization=main_quantization(source) if weights == KEEP else weights.upper(),
        steps=tuple(steps),
    )


def all_options(source: SizedSource) -> list[Option]:
    """Every option that is possible for this model and does not enlarge it, by order of expected loss."""
    own = option(source, None, "f16", KEEP)
    found = []
    for keep, weights, cache_type in product((None, *TARGETS), WEIGHTS, COMMON_CACHES):
        try:
            made = option(source, keep, cache_type, weights)
        except InputError:  # already MLA, or too few values for a latent
            continue
        except ValueError:  # the cache type's blocks do not divide the rows
            continue
        if weights == KEEP or made.weights_nbytes < 0.95 * own.weights_nbytes:
            found.append(made)
    return sorted(found, key=lambda made: made.loss_order)


def converted_spec(spec: ModelSpec, keep: float) -> ModelSpec:
    """The MLA spec that `edgekv convert --target keep` makes of a GQA model."""
    gqa = convertible_attention(spec)
    rank, rope_dim = choose_rank(gqa, keep)
    attention = target_spec(gqa, rank, rope_dim, min(32, rank), gqa.head_dim)
    return replace(
        spec, arch="deepseek2", layers=tuple(replace(layer, attention=attention) for layer in spec.layers)
    )


def _tensor_nbytes(
    source: SizedSource, name: str, shape: tuple[int, ...], keep: float | None, weights: str
) -> int:
    """A tensor that is copied keeps its bytes; one that conversion computes is written as q8_0."""
    fitted = keep is not None and ".attn_" in name and not name.endswith("attn_norm.weight")
    if weights == KEEP and not fitted:
        return source.nbytes(name)
    return stored_nbytes(name, shape, "q8_0" if weights == KEEP else weights)
