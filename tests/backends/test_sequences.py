"""Several sequences in one cache: each goes on as it would alone, whatever runs or is cut beside it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.llama_cpp.footprint import cache_nbytes
from edgekv.backends.llama_cpp.sequences import LlamaSequences
from edgekv.backends.open import open_backend, open_sequences
from edgekv.backends.sequences import OneSequence, Piece, Sequences
from edgekv.errors import BackendError, InputError
from edgekv.models.open import open_model
from edgekv.source import Array

PROMPTS = [list(range(start, start + n)) for start, n in ((5, 40), (90, 3), (30, 17))]
N_NEW = 12
# llama.cpp computes one token with other kernels than several, so logits of up to 15 differ by a few thousandths here;
# a row too many, too few or at another place changes them by whole units.
ATOL = 0.03


@pytest.fixture(params=["tiny_llama", "tiny_mla"], scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def sequences(model: Path) -> Iterator[LlamaSequences]:
    opened = open_sequences(model, n_parallel=3, n_ctx=256, cache_type="f32", n_threads=1)
    assert isinstance(opened, LlamaSequences)
    yield opened
    opened.close()


def alone(model: Path, prompt: list[int]) -> list[Array]:
    """Logits of a greedy run by a backend of one sequence."""
    backend = open_backend(model, n_ctx=256, cache_type="f32", n_threads=1)
    rows = [backend.prefill(prompt)]
    while len(rows) < N_NEW:
        rows.append(backend.decode(int(rows[-1].argmax())))
    backend.close()
    return rows


def test_sequences_side_by_side_are_those_of_lone_runs(model: Path, sequences: LlamaSequences) -> None:
    """Prompts start at different steps, in slices of 8 beside the others' single tokens."""
    expected = [alone(model, prompt) for prompt in PROMPTS]
    texts = [
        prompt + [int(row.argmax()) for row in rows] for prompt, rows in zip(PROMPTS, expected, strict=True)
    ]
    starts: list[int] = [0, 0, 0]
    seen: list[list[Array]] = [[], [], []]
    for step in range(60):
        pieces = []
        for i, prompt in enumerate(PROMPTS):
            if step < 2 * i or len(seen[i]) == N_NEW:
                continue
            end = min(len(prompt), starts[i] + 8) if starts[i] < len(prompt) else starts[i] + 1
            pieces.append(Piece(i, starts[i], texts[i][starts[i] : end], logits=end >= len(prompt)))
            starts[i] = end
        logits = iter(sequences.run(pieces)) if pieces else iter(())
        for piece in pieces:
            if piece.logits:
                seen[piece.sequence].append(next(logits))
    np.testing.assert_allclose(seen, expected, rtol=0, atol=ATOL)


def test_shared_rows_and_what_follows_them(model: Path, sequences: LlamaSequences) -> None:
    """A sequence with 30 rows of another goes on by itself, also once the first is gone."""
    first = PROMPTS[0]
    sequences.run([Piece(0, 0, first, logits=False)])
    sequences.share(0, 200, 0, 30)  # kept beyond the parallel ones
    sequences.trim(0, 0)
    sequences.share(200, 1, 0, 30)
    second = first[:30] + PROMPTS[1]
    (last,) = sequences.run([Piece(1, 30, PROMPTS[1], logits=True)])
    np.testing.assert_allclose(last, alone(model, second)[0], rtol=0, atol=ATOL)
    sequences.trim(1, 30)
    (last,) = sequences.run([Piece(1, 30, PROMPTS[2], logits=True)])
    np.testing.assert_allclose(last, alone(model, first[:30] + PROMPTS[2])[0], rtol=0, atol=ATOL)


def test_the_cache_holds_all_that_it_promises_and_no_more(sequences: LlamaSequences) -> None:
    assert (sequences.n_ctx, sequences.n_cells) == (256, 768)
    for i in range(3):
        sequences.run([Piece(i, 0, [7] * 256, logits=False)])
    for i in range(3, 200):  # shared rows take no cells
        sequences.share(2, i, 0, 256)
    sequences.trim(2, 0)
    with pytest.raises(BackendError, match="status 1"):
        sequences.run([Piece(2, 0, [7], logits=True)])
    for i in range(3, 200):
        sequences.trim(i, 255)
    assert len(sequences.run([Piece(2, 0, [7], logits=True)])) == 1


def test_other_engines_have_one_sequence(tiny_llama: Path) -> None:
    with pytest.raises(InputError, match="--parallel 1"):
        open_sequences(tiny_llama, "reference", n_parallel=2)
    opened: Sequences = open_sequences(tiny_llama, "reference", n_ctx=64)
    assert isinstance(opened, OneSequence)
    (first,) = opened.run([Piece(0, 0, PROMPTS[0], logits=True)])
    opened.trim(0, 20)
    assert opened.run([Piece(0, 20, PROMPTS[0][20:39], logits=False)]) == []
    (again,) = opened.run([Piece(0, 39, PROMPTS[0][39:], logits=True)])
    np.testing.assert_allclose(first, again, rtol=0, atol=ATOL)
    opened.close()


@pytest.mark.parametrize("n_parallel", [1, 2])
def test_a_window_forgets_nothing_that_is_shared(tiny_gemma: Path, n_parallel: int) -> None:
    """Of 900 tokens a cache that kept the window of 64 and a micro-batch would have let the first hundred go."""
    tokens = np.random.default_rng(5).integers(0, 256, 900).tolist()
    opened = open_sequences(tiny_gemma, n_parallel=n_parallel, n_ctx=1024, cache_type="f32", n_threads=1)
    assert isinstance(opened, LlamaSequences)
    spec = open_model(tiny_gemma).spec
    assert opened.cache_nbytes() == 1024 * n_parallel * spec.kv_bytes_per_token("f32")
    assert opened.cache_nbytes() == cache_nbytes(
        spec, "f32", 1024 * n_parallel, opened.n_batch, keeps_all=True
    )
    for start in range(0, len(tokens), 300):
        opened.run([Piece(0, start, tokens[start : start + 300], logits=False)])
    opened.share(0, 5, 0, 100)
    opened.trim(0, 0)
    opened.share(5, 0, 0, 100)
    (last,) = opened.run([Piece(0, 100, PROMPTS[1], logits=True)])
    np.testing.assert_allclose(last, alone(tiny_gemma, tokens[:100] + PROMPTS[1])[0], rtol=0, atol=ATOL)
    opened.close()


def test_rows_of_one_go_to_another_through_holes(model: Path, sequences: LlamaSequences) -> None:
    """Rows that lie apart, of a sequence that only keeps them, are put where only holes are free."""
    texts = [[int(token) for token in np.random.default_rng(i).integers(0, 256, 250)] for i in range(3)]
    for start in range(0, 250, 10):  # turn by turn, so that the cells of each lie apart
        sequences.run([Piece(i, start, text[start : start + 10], False) for i, text in enumerate(texts)])
    sequences.share(1, 200, 0, 250)
    sequences.trim(1, 0)
    saved = sequences.save(200)
    assert saved.layout == sequences.layout()
    part = sequences.save(200, 100)
    assert [a.tobytes() for a in part.planes()] == [a[100:].tobytes() for a in saved.planes()]
    sequences.trim(2, 0)
    for target in (1, 201):
        sequences.load(target, saved)
        with pytest.raises(BackendError):
            sequences.load(2, saved)  # there is no room for a third one
        sequences.trim(2, 0)
        assert [a.tobytes() for a in sequences.save(target).planes()] == [a.tobytes() for a in saved.planes()]
        if target != 1:
            sequences.share(target, 1, 0, 250)
        (logits,) = sequences.run([Piece(1, 250, [7], True)])
        lone = open_backend(model, n_ctx=256, cache_type="f32", n_threads=1)
        np.testing.assert_allclose(logits, lone.prefill([*texts[1], 7]), rtol=0, atol=2 * ATOL)
        lone.close()
        sequences.trim(1, 0)
        sequences.trim(target, 0)
