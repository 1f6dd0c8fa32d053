"""The Backend protocol, which every inference engine implements, and the checks that all of them make."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from edgekv.backends.kernel_names import Kernel
from edgekv.cache.policies.base import LayerView, Need, Rows
from edgekv.cache.rows import CacheRows, Layout, row_nbytes
from edgekv.errors import BackendError, InputError, UnsupportedError
from edgekv.quant.cache_format import CacheFormat
from edgekv.source import Array

DEFAULT_N_CTX = 4096  # the largest context that is opened unasked


class Interrupted(Exception):
    """The abort flag ended a call early; the tokens processed until then stay in the cache."""


class Backend(Protocol):
    """One model, one sequence, one cache. Not thread-safe.

    Attributes:
        n_ctx: tokens that the cache can hold.
        n_ctx_train: tokens that the model was trained for (max_position_embeddings); None where it does not say.
        n_past: the next token's position; `prefill` and `decode` append to it.
        n_rows: tokens in the cache: n_past, unless some were evicted.
        kernel: "edgekv" where llama.cpp's attention is EdgeKV's kernel, else "stock".
    """

    name: str
    kernel: Kernel = "stock"
    n_ctx: int
    n_ctx_train: int | None = None
    n_vocab: int
    n_past: int

    @property
    def n_rows(self) -> int:
        return self.n_past

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits of the last one, shape (vocab,).

        Raises:
            BackendError: the cache has no room for them, or the engine failed.
            Interrupted: the engine's abort flag was set.
        """

    def prefill_all(self, tokens: Sequence[int]) -> Array:
        """Append tokens; logits of every one, shape (T, vocab). Raises as `prefill` does."""

    def decode(self, token: int) -> Array:
        """Append one token; its logits, shape (vocab,). Raises as `prefill` does."""
        return self.prefill([token])

    def trim(self, n_past: int) -> None:
        """Drop every cached token from position `n_past` on. Never shifts those before it.

        A cache that has let go of tokens which the next one would see (llama.cpp keeps little more than the
        window of layers that have one; evicted tokens are gone) is emptied instead: read the attribute `n_past` to
        see what is left.
        """

    def layout(self) -> Layout:
        """What the cache holds of every token: the layout of what `save` returns and `load` takes.

        Raises:
            UnsupportedError: the engine keeps more of this model than rows of tokens.
        """

    def save(self, start: int = 0) -> CacheRows:
        """A copy of the cached rows of tokens `start` to `n_past`. Raises as `layout` does."""

    def load(self, rows: CacheRows) -> None:
        """Put rows in the place of all that is cached, from position 0 on; `n_past` is their number then.

        Their values decide what the model says, and nothing else: no bytes in them can crash an engine.

        Raises:
            InputError: the rows are of another layout, or more than `n_ctx`.
            UnsupportedError: as `layout` does.
            BackendError: the engine refused them; the cache is empty then.
        """

    def collect_attention(self, on: bool) -> None:
        """Add up, from nothing, the attention that cached rows get from now on; or stop.

        Costs a second look at every row for the tokens that run meanwhile, and nothing otherwise.

        Raises:
            UnsupportedError: the engine cannot tell.
        """
        raise UnsupportedError(
            f"{self.name} does not tell which rows it attends to; take llama.cpp with EdgeKV's kernel (`edgekv kernel`)"
        )

    def attention_mass(self) -> Array:
        """The attention that each cached row got, float32 (layers, n_past): its softmax weights, summed over the heads
        and the tokens that ran since `collect_attention(True)`, which has to have been called.

        Every such token gives each layer as much as there are heads. `trim` and `load` forget what the rows got
        which they drop.
        """
        raise AssertionError("attention is not collected")

    def cache_nbytes(self) -> int:
        """Bytes that the engine allocated for its cache (all of n_ctx)."""

    def close(self) -> None:
        """Free the model."""


class EvictableBackend(Backend):
    """A Backend whose rows can be evicted: edgekv.backends.evicting says when, and a policy which.

    Attributes:
        merges: whether an evicted token leaves all layers at once; else each head of each has rows of its own.
        layers_differ: whether layers may keep different numbers of rows.
        max_positions: positions that it knows, where that is bounded by more than its cache.
    """

    merges: bool
    layers_differ: bool = False
    max_positions: int | None = None

    @abstractmethod
    def require_evictable(self, needs: Collection[Need]) -> None:
        """Make sure that policies can be shown these fields of LayerView; called before the first token.

        Raises:
            UnsupportedError: the engine cannot evict rows of this model, or not show this.
        """

    @abstractmethod
    def views(self) -> Iterator[LayerView]:
        """What a policy sees of each layer, with the fields that `require_evictable` was asked for.

        Raises:
            BackendError: the engine failed.
        """

    @abstractmethod
    def keep(self, rows: Sequence[Rows]) -> None:
        """Evict every cached row but these; positions stay what they were, and the memory is used again.

        Args:
            rows: for each layer the indices (G, n) of rows that each head keeps, ascending; where the engine
                merges, one array (n,) for all layers. The last row is among them: engines number tokens from it.
        """


def require_no_window(windows: Iterable[int | None]) -> None:
    """Raise UnsupportedError if a layer has a sliding window; engines check this before they evict."""
    if any(windows):
        raise UnsupportedError(
            "layers with a sliding window let go of tokens by themselves; leave the budget out"
        )


def require_positive(**options: int | None) -> None:
    """Raise InputError, naming the option, if one is below 1; None stands for an option that was not given."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


def require_cache_format(cache_type: str) -> CacheFormat:
    """What a cache type of llama.cpp stands for; InputError if it stands for nothing."""
    try:
        return CacheFormat.parse(cache_type)
    except ValueError as error:
        raise InputError(str(error)) from error


def require_room(backend: Backend, count: int) -> None:
    """Raise BackendError unless `count` more tokens fit in the cache; engines check this before they run."""
    require_free(backend.n_rows, count, backend.n_ctx)


def require_free(n_used: int, count: int, n_ctx: int) -> None:
    """Raise BackendError unless `count` more tokens fit in a context with `n_used`."""
    assert count > 0
    if n_used + count > n_ctx:
        raise BackendError(
            f"the cache holds {n_used} of {n_ctx} tokens and {count} more do not fit; "
            "open the model with a larger context"
        )


def require_loadable(backend: Backend, rows: CacheRows) -> None:
    """Raise InputError unless the backend's cache can take these rows; engines check this before they copy them."""
    layout = backend.layout()
    if rows.layout != layout:
        raise InputError(
            f"the cached rows are {describe_layout(rows.layout)}, and this engine keeps {describe_layout(layout)}; "
            "open the model with the cache type and engine that they were saved with"
        )
    if len(rows.data) != rows.n_tokens * row_nbytes(layout):
        raise InputError(
            f"{rows.n_tokens} cached rows cannot take {len(rows.data)} bytes; make the file again"
        )
    if rows.n_tokens > backend.n_ctx:
        raise InputError(
            f"{rows.n_tokens} cached tokens do not fit a context of {backend.n_ctx}; open the model with a larger one"
        )


def describe_layout(layout: Layout) -> str:
    """A layout in a few words, for errors."""
    kinds = dict.fromkeys(
        f"{p.cache_type}{' ' + p.encoding if p.encoding else ''} x {p.values}" for p in layout
    )
    return f"{len(layout)} planes of {' and '.join(kinds)}" if layout else "no rows"
