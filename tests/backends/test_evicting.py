"""Caches of fixed size: the same in every engine, with memory that is used again and positions that stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from edgekv.backends.base import EvictableBackend
from edgekv.backends.evicting import EvictingBackend
from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.llama_cpp.backend import LlamaCppBackend
from edgekv.backends.llama_cpp.state import StoredRows
from edgekv.backends.open import open_backend, open_sequences
from edgekv.backends.sequences import Piece
from edgekv.cache.policies.base import Need
from edgekv.cache.policies.expected import ExpectedAttention
from edgekv.cache.policies.settings import Eviction
from edgekv.cache.policies.snapkv import SnapKV
from edgekv.cli.main import cli
from edgekv.errors import InputError, UnsupportedError
from edgekv.export.gguf.write import write_gguf
from edgekv.export.onnx.write import OnnxOptions, write_onnx
from edgekv.models.open import open_model
from edgekv.progress import ignore
from edgekv.serve.engine.prefixes import Prefixes, block_hashes
from edgekv.source import LazySource
from edgekv.workflows.chat import ChatRequest, SamplingParams, open_chat

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 250, 300)]
SMALL = Eviction("streaming", budget=64, slice_size=32, every=16, sinks=4, recent=16)


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX folders of the models, one with 8-bit latents."""
    found = {}
    for name, path, cache in (
        ("tiny_llama", tiny_llama, "f32"),
        ("tiny_mla", tiny_mla, "f32"),
        ("int8", tiny_mla, "int8"),
    ):
        found[name] = tmp_path_factory.mktemp("onnx") / name
        write_onnx(open_model(path), found[name], OnnxOptions("f32", cache), False, ignore)
    return found


@pytest.fixture(scope="module")
def wide_llama(make_llama: Callable[..., LazySource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads llama.cpp turns before it rounds them: keys by 128 values, values by 64."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    write_gguf(make_llama(n_heads=4, n_kv_heads=2, head_dim=128), path, "f32", {}, False, ignore)
    return path


def opened(path: Path, kind: str, policy: str = "streaming", **changes: Any) -> EvictingBackend:
    backend = open_backend(
        path,
        kind,
        n_ctx=400,
        cache_type="f32" if kind == "llama.cpp" else None,
        n_threads=None if kind == "reference" else 1,
        eviction=replace(SMALL, policy=policy, **changes),
    )
    assert isinstance(backend, EvictingBackend)
    return backend


@pytest.mark.parametrize("kind", ["reference", "llama.cpp"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_rows_never_exceed_the_cells(request: pytest.FixtureRequest, kind: str, model: str) -> None:
    backend = opened(request.getfixturevalue(model), kind)
    inner: EvictableBackend = backend.backend
    backend.prefill(TOKENS[:250])
    assert backend.n_past == 250
    assert SMALL.budget <= backend.n_rows <= SMALL.n_cells
    for token in TOKENS[250:]:
        backend.decode(token)
        assert backend.n_rows <= SMALL.budget + SMALL.every
    assert backend.n_past == 300
    assert inner.n_ctx < 300
    backend.close()


@pytest.mark.parametrize("policy", ["streaming", "knorm", "keydiff", "critical-keydiff"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_llama_cpp_and_the_reference_agree_on_the_rows(
    request: pytest.FixtureRequest, model: str, policy: str
) -> None:
    """They are given the same rows to keep: with gaps, both must predict the same."""
    path = request.getfixturevalue(model)
    reference, engine = (
        opened(path, kind, policy, budget=200, slice_size=200) for kind in ("reference", "llama.cpp")
    )
    for backend in (reference, engine):
        backend.prefill(TOKENS[:180])
    engine.evict(90)
    kept = engine.backend._positions.all(180)  # type: ignore[attr-defined]
    assert len(kept) == 90
    assert set(range(4)) | set(range(164, 180)) <= set(kept)
    everywhere = [np.broadcast_to(kept, (view.n_heads, 90)) for view in reference.backend.views()]
    reference.backend.keep(everywhere)
    for token in TOKENS[180:184]:
        theirs, ours = engine.decode(token), reference.decode(token)
    # llama.cpp's own rounding moves these logits by 0.03, without eviction too; another choice of rows by 6.
    np.testing.assert_allclose(theirs, ours, atol=0.06, rtol=0)
    engine.close()


@pytest.mark.parametrize("kind", ["reference", "llama.cpp"])
def test_trim_goes_back_into_the_recent_rows_or_empties(tiny_llama: Path, kind: str) -> None:
    backend = opened(tiny_llama, kind)
    backend.prefill(TOKENS[:200])
    backend.evict(40)
    before = backend.decode(5)
    backend.trim(200)
    np.testing.assert_allclose(backend.decode(5), before, atol=1e-4)
    backend.trim(190)
    assert (backend.n_past, backend.n_rows) == (190, 30)
    backend.trim(100)  # most of its rows are gone
    assert (backend.n_past, backend.n_rows) == (0, 0)
    fresh = opened(tiny_llama, kind)
    np.testing.assert_allclose(backend.prefill(TOKENS[:50]), fresh.prefill(TOKENS[:50]), atol=1e-4)
    backend.close()
    fresh.close()


def test_llama_cpp_tells_attention_with_the_kernel_alone(tiny_llama: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"does not tell .* take llama.cpp with EdgeKV's kernel"):
        opened(tiny_llama, "llama.cpp", "h2o")


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_rows_are_read_where_llama_cpp_keeps_them(
    request: pytest.FixtureRequest, model: str, cache_type: str
) -> None:
    """The same bytes as in llama.cpp's own copy, behind evictions that leave gaps, which are filled, and a trim."""
    backend = LlamaCppBackend(request.getfixturevalue(model), n_ctx=256, cache_type=cache_type, n_threads=1,
                              shows={"keys"})  # fmt: skip
    backend.require_evictable({"keys"})
    rng = np.random.default_rng(0)
    for start in range(0, 120, 40):
        backend.prefill(TOKENS[start : start + 40])
        last = backend.n_rows - 1
        backend.keep([np.append(np.sort(rng.choice(last, 29, replace=False)), last)])
    backend.prefill(TOKENS[120:140])
    backend.trim(130)
    found = backend._stored_rows()
    copied = StoredRows.of_state(backend._state(0), backend._encodings)
    assert (found.are_cells, copied.are_cells) == (True, False)
    assert not np.shares_memory(found.planes[0], copied.planes[0])
    assert found.layout == copied.layout
    np.testing.assert_array_equal(found.positions, copied.positions)
    for i in range(len(found.layout)):
        np.testing.assert_array_equal(found.plane(i), copied.plane(i))
    backend.close()


def test_norms_of_rows_that_stay_are_not_computed_again(tiny_llama: Path) -> None:
    """What was kept of earlier evictions is what a fresh look at all rows gives, also where tokens were replaced."""
    needs: frozenset[Need] = frozenset({"keys", "norms"})
    backend = LlamaCppBackend(tiny_llama, n_ctx=256, cache_type="f32", n_threads=1, shows=needs)
    backend.require_evictable(needs)
    backend.prefill(TOKENS[:100])
    list(backend.views())
    backend.keep([np.r_[0:10, 40:100]])
    backend.prefill(TOKENS[100:130])
    list(backend.views())
    backend.trim(120)
    backend.prefill(TOKENS[5:45])
    kept = [view.norms for view in backend.views()]
    assert backend._views is not None
    assert backend._views.norms is not None
    backend._views.norms.trim(0)
    for norms, view in zip(kept, backend.views(), strict=True):
        assert norms is not None
        assert norms.shape == (2, 130)
        np.testing.assert_allclose(norms, view.norms, rtol=1e-5)
    backend.close()


@pytest.mark.parametrize(
    ("model", "cache_type"), [("tiny_llama", "f32"), ("wide_llama", "q8_0"), ("tiny_mla", "f32")]
)
def test_llama_cpp_shows_what_the_reference_shows(
    request: pytest.FixtureRequest, model: str, cache_type: str
) -> None:
    """Queries, what they are like, and norms: as scores see them, in whatever basis the cache is."""
    path = request.getfixturevalue(model)
    both = []
    for kind, kept in (("reference", None), ("llama.cpp", cache_type)):
        backend = open_backend(
            path,
            kind,
            n_ctx=400,
            cache_type=kept,
            eviction=replace(SMALL, policy="critical-expected", budget=200),
        )
        assert isinstance(backend, EvictingBackend)
        backend.prefill(TOKENS[:100])
        backend.decode(TOKENS[100])
        both.append(list(backend.backend.views()))
        scores = [ExpectedAttention().scores(view, 50) for view in both[-1]]
        both[-1] = list(zip(both[-1], scores, strict=True))
        backend.close()
    atol = 0.02 if cache_type == "q8_0" else 2e-3
    for (expected, theirs), (found, ours) in zip(*both, strict=True):
        np.testing.assert_allclose(ours[:, 4:], theirs[:, 4:], atol=atol * theirs[:, 4:].max())
        for a, b in zip(found.norms, expected.norms, strict=True):  # root mean squares for sums of magnitudes
            assert np.corrcoef(a, b)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("model", "cache_type"), [("tiny_llama", "f32"), ("wide_llama", "q8_0"), ("tiny_mla", "f32")]
)
def test_llama_cpp_shows_the_last_queries(
    request: pytest.FixtureRequest, model: str, cache_type: str
) -> None:
    path = request.getfixturevalue(model)
    found = []
    for kind, kept in (("reference", None), ("llama.cpp", cache_type)):
        backend = open_backend(
            path, kind, n_ctx=400, cache_type=kept, eviction=replace(SMALL, policy="snapkv", budget=200)
        )
        assert isinstance(backend, EvictingBackend)
        backend.prefill(TOKENS[:100])
        backend.decode(TOKENS[100])
        found.append([SnapKV().scores(view, 90)[:, :37] for view in backend.backend.views()])
        backend.close()
    for theirs, ours in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.03 * theirs.max())


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_onnxruntime_and_the_reference_agree(
    request: pytest.FixtureRequest, folders: dict[str, Path], model: str
) -> None:
    """Each chooses for itself, by head and layer, through a prompt in slices and while it decodes."""
    reference, engine = (
        opened(path, kind, "keydiff")
        for path, kind in ((request.getfixturevalue(model), "reference"), (folders[model], "onnx"))
    )
    assert engine.cache_nbytes() <= reference.cache_nbytes()
    np.testing.assert_allclose(engine.prefill(TOKENS[:250]), reference.prefill(TOKENS[:250]), atol=2e-3)
    for token in TOKENS[250:]:
        theirs, ours = engine.decode(token), reference.decode(token)
        assert engine.n_rows == reference.n_rows
    np.testing.assert_allclose(theirs, ours, atol=2e-3)
    engine.trim(296)
    reference.trim(296)
    np.testing.assert_allclose(engine.decode(9), reference.decode(9), atol=2e-3)
    engine.close()


def test_latents_in_8_bits_are_evicted_with_their_scales(folders: dict[str, Path]) -> None:
    exact, rounded = (opened(folders[name], "onnx", "keydiff") for name in ("tiny_mla", "int8"))
    for backend in (exact, rounded):
        backend.prefill(TOKENS[:90])
        backend.backend.keep([np.r_[0:30, 60:90][None]] * 3)
    first, second = (backend.decode(7) for backend in (exact, rounded))
    assert rounded.n_rows == exact.n_rows == 61
    assert np.corrcoef(first, second)[0, 1] > 0.99
    exact.close()
    rounded.close()


def test_a_graph_names_the_policies_that_work(folders: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match="not queries; take the policy streaming, knorm or keydiff"):
        opened(folders["tiny_mla"], "onnx", "snapkv")


def test_a_budget_that_cannot_be_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="a budget of 3 tokens is too small"):
        opened(tiny_llama, "reference", budget=3)
    with pytest.raises(InputError, match="there is no policy 'best'"):
        opened(tiny_llama, "reference", "best")


@pytest.mark.parametrize("policy", ["snapkv", "tova", "h2o", "critical-snapkv"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_policies_that_watch_queries_run_in_the_reference(
    request: pytest.FixtureRequest, model: str, policy: str
) -> None:
    backend = opened(request.getfixturevalue(model), "reference", policy)
    backend.prefill(TOKENS[:150])
    for token in TOKENS[150:200]:
        logits = backend.decode(token)
    assert np.isfinite(logits).all()
    assert backend.n_rows <= SMALL.budget + SMALL.every


def test_a_process_of_its_own_evicts_the_same(tiny_llama: Path) -> None:
    near = opened(tiny_llama, "llama.cpp", "keydiff")
    far = IsolatedBackend(
        tiny_llama,
        "llama.cpp",
        n_ctx=400,
        cache_type="f32",
        n_threads=1,
        eviction=replace(SMALL, policy="keydiff"),
    )
    assert (far.n_ctx, far.n_cells) == (400, SMALL.n_cells)
    np.testing.assert_allclose(far.prefill(TOKENS[:250]), near.prefill(TOKENS[:250]), atol=1e-4)
    np.testing.assert_allclose(far.decode(5), near.decode(5), atol=1e-4)
    far.trim(100)
    assert far.n_past == 0
    with pytest.raises(UnsupportedError, match="a cache of fixed size lets go of tokens"):
        far.layout()
    near.close()
    far.close()


def test_a_server_that_evicts_runs_one_sequence_and_shares_nothing(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="one request at a time; take --parallel 1"):
        open_sequences(tiny_llama, n_parallel=2, eviction=SMALL)
    engine = open_sequences(tiny_llama, n_ctx=400, eviction=SMALL)
    prefixes = Prefixes(engine)
    for _ in range(2):
        rows = prefixes.begin(TOKENS[:300], block_hashes(TOKENS[:300]))
        assert not rows.tokens
        (logits,) = engine.run([Piece(rows.sequence, 0, TOKENS[:300], logits=True)])
        prefixes.appended(rows, TOKENS[:300])
        prefixes.finish(rows)
    assert np.isfinite(logits).all()
    engine.close()


def test_a_conversation_goes_on_in_few_rows(tiny_llama: Path) -> None:
    request = ChatRequest(tiny_llama, budget=64, policy="critical-knorm", max_tokens=150, threads=1,
                          sampling=SamplingParams(temperature=0))  # fmt: skip
    with open_chat(request) as chat:
        assert chat.engine.n_ctx == chat.engine.n_ctx_train == 512
        for question in ("abc" * 60, "what then", "and then?"):
            *_, last = chat.ask(question)
        assert last.finish in ("length", "stop", "context")
        assert chat.session.turns


def test_packs_beside_a_budget_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    request = ChatRequest(tiny_llama, budget=64, packs=(tmp_path / "some.pack",))
    with pytest.raises(InputError, match="leave --pack or --budget out"), open_chat(request):
        pass


@pytest.mark.parametrize("layers", ["pyramid", "entropy"])
def test_layers_may_keep_different_numbers_in_the_reference(tiny_llama: Path, layers: str) -> None:
    settings = replace(SMALL, policy="keydiff", layers=layers)
    backend = open_backend(tiny_llama, "reference", n_ctx=400, eviction=settings)
    assert isinstance(backend, EvictingBackend)
    backend.prefill(TOKENS[:250])
    backend.evict(60)
    rows = [view.n_rows for view in backend.backend.views()]
    assert sum(rows) <= 60 * len(rows)
    assert layers == "entropy" or rows == sorted(rows, reverse=True) != [60, 60, 60]
    for token in TOKENS[250:]:
        logits = backend.decode(token)
    assert np.isfinite(logits).all()
    with pytest.raises(UnsupportedError, match="as many rows in each layer; leave --layers out"):
        open_backend(tiny_llama, "llama.cpp", eviction=settings)


def test_budgets_over_layers_from_the_command_line(tiny_llama: Path) -> None:
    arguments = ["chat", str(tiny_llama), "-p", "ab", "-n", "4", "--temp", "0", "--budget", "64"]
    run = CliRunner().invoke(cli, [*arguments, "--layers", "pyramid", "--backend", "reference"])
    assert run.exit_code == 0, run.output
    refused = CliRunner().invoke(cli, [*arguments, "--layers", "pyramid"])
    assert "as many rows in each layer; leave --layers out" in f"{refused.exception}{refused.output}"
    with pytest.raises(InputError, match="budgets over layers cannot be 'steep'"):
        opened(tiny_llama, "reference", layers="steep")


@pytest.mark.parametrize("kind", ["llama.cpp", "reference"])
def test_windows_are_refused(tiny_gemma: Path, kind: str) -> None:
    with pytest.raises(UnsupportedError, match="let go of tokens by themselves"):
        open_backend(tiny_gemma, kind, n_ctx=64, eviction=replace(SMALL, policy="streaming"))
