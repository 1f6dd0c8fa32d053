"""The memory that a model will take once it is loaded: weights and cache exactly, buffers by their shapes.

Weights are the bytes of the tensors; the cache is computed from the spec, in whole blocks of 256 cells, of which
layers with a window have few. The rest is a fit to llama-cpp-python 0.3.36 with GQA, MHA and MLA models of eight
shapes (docs/reports.md): the largest stage of the graph for one micro-batch, and a runtime that grows with the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgekv.host.memory import SMALL_RAM_NBYTES
from edgekv.models.gguf.architectures import LOCAL_EVERY
from edgekv.quant.formats import FORMATS
from edgekv.source import SizedSource
from edgekv.spec import GQA, AttentionSpec, LayerSpec, ModelSpec
from edgekv.tensors import looked_up

CELLS = 256  # llama.cpp rounds a context up to whole blocks of cells
RUNTIME_NBYTES = 33 * 2**20  # Python, NumPy and libllama without a model; `this_board` measures its own
ENGINE_NBYTES = 13 * 2**20  # added by loading any model
VOCAB_NBYTES = 246  # per token in llama.cpp's vocabulary and merge tables
LAYER_NBYTES = 50_000  # graph nodes of one layer
MASK_NBYTES = 2  # per cell of the attention mask and token of the micro-batch


@dataclass(frozen=True)
class Footprint:
    """Predicted bytes. `repacked_nbytes` is a second copy of some of the weights."""

    weights_nbytes: int
    repacked_nbytes: int
    cache_nbytes: int
    compute_nbytes: int
    runtime_nbytes: int

    @property
    def rss_nbytes(self) -> int:
        """Peak resident memory of the process."""
        return self.needed_nbytes + self.repacked_nbytes

    @property
    def needed_nbytes(self) -> int:
        """Bytes that must stay in memory: the system can drop mapped originals of repacked weights."""
        return self.weights_nbytes + self.cache_nbytes + self.compute_nbytes + self.runtime_nbytes


def footprint(
    spec: ModelSpec,
    weights_nbytes: int,
    cache_type: str,
    n_ctx: int,
    n_ubatch: int,
    repacked_nbytes: int = 0,
    depth: int | None = None,
    runtime_nbytes: int = RUNTIME_NBYTES,
    keeps_all: bool = False,
) -> Footprint:
    """Memory of one process with one sequence.

    Args:
        depth: tokens in the cache; by default n_ctx.
        runtime_nbytes: memory of the process without a model, which differs between installations.
        keeps_all: layers with a window keep the whole context.

    Raises:
        ValueError: the cache type does not fit the model's dims.
    """
    filled = n_ctx if depth is None else depth
    return Footprint(
        weights_nbytes=weights_nbytes,
        repacked_nbytes=repacked_nbytes,
        cache_nbytes=cache_nbytes(spec, cache_type, n_ctx, n_ubatch, keeps_all),
        compute_nbytes=compute_nbytes(spec, min(n_ubatch, filled), filled),
        runtime_nbytes=runtime_nbytes + ENGINE_NBYTES + VOCAB_NBYTES * spec.vocab,
    )


def cache_nbytes(spec: ModelSpec, cache_type: str, n_ctx: int, n_ubatch: int, keeps_all: bool = False) -> int:
    """Bytes that llama.cpp allocates for keys and values; `keeps_all` as in `footprint`.

    Raises:
        ValueError: the cache type does not fit the model's dims.
    """
    attentions = [layer.attention for layer in spec.layers]
    return sum(
        attention.kv_bytes_per_token(cache_type)
        * cells(0 if keeps_all else graph_window(spec, attention), n_ctx, n_ubatch)
        for attention in attentions
    )


def cells(window: int, n_ctx: int, n_ubatch: int) -> int:
    """Cells of a layer: those of the context, or of its window and one micro-batch (llama-kv-cache-iswa.cpp)."""
    return _padded(min(n_ctx, window + n_ubatch) if window else n_ctx)


def graph_window(spec: ModelSpec, attention: AttentionSpec) -> int:
    """The window that llama.cpp's graph gives a layer, 0 for none.

    It attends to all tokens in other architectures than Gemma's, whatever window the model was trained with.
    """
    return attention.window if isinstance(attention, GQA) and spec.arch in LOCAL_EVERY else 0


def seen_tokens(spec: ModelSpec, attention: AttentionSpec, depth: int) -> int:
    """Of `depth` tokens in the cache, those that a layer attends to."""
    return min(depth, graph_window(spec, attention) or depth)


def _padded(count: int) -> int:
    return -(-count // CELLS) * CELLS


def compute_nbytes(spec: ModelSpec, n_ubatch: int, depth: int) -> int:
    """Compute buffers that become resident in a prefill with micro-batches of `n_ubatch` tokens."""
    floats = max(max(_feed_forward(spec.dim, layer), _attention(spec.dim, layer)) for layer in spec.layers)
    return n_ubatch * (4 * floats + MASK_NBYTES * depth) + LAYER_NBYTES * spec.n_layers


def _feed_forward(dim: int, layer: LayerSpec) -> int:
    """Floats per token: gate, up and their product, the same quantized, and four rows of the model's width."""
    return round(3.27 * layer.ffn_dim) + 4 * dim


def _attention(dim: int, layer: LayerSpec) -> int:
    """Floats per token: queries, keys, values and output; absorbed MLA holds three rows of H x R at once."""
    a = layer.attention
    if isinstance(a, GQA):
        return 3 * a.n_heads * a.head_dim + 2 * a.n_kv_heads * a.head_dim + 2 * dim
    return a.n_heads * (3 * a.kv_lora_rank + a.rope.dim)


def repacked_nbytes(source: SizedSource, isa: Collection[str]) -> int:
    """Bytes of the copies that llama.cpp makes of two-dimensional weights on a CPU with these features.

    The mapped originals stay, but the system can drop them. On CPUs with AMX, EdgeKV turns repacking off (see
    edgekv.backends.llama_cpp.library.repacking_is_safe).
    """
    if "amx_tile" in isa:
        return 0
    cpu = "arm" if "asimddp" in isa else "x86" if "avx2" in isa else ""
    return sum(
        source.nbytes(name)
        for name in source.names()
        if len(source.shape(name)) == 2
        and cpu in FORMATS[source.quantization(name).lower()].repacked
        and name not in looked_up(source.spec)
    )


def default_ubatch(ram_nbytes: int) -> int:
    """Tokens per micro-batch with this much RAM: large ones are faster, but need larger buffers."""
    return 512 if ram_nbytes >= SMALL_RAM_NBYTES else 128
