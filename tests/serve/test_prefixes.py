"""Prompts over a cache with rows of others: what is found again, what goes first, and that nobody gets wrong rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.llama_cpp.sequences import LlamaSequences
from edgekv.backends.open import open_backend, open_sequences
from edgekv.backends.sequences import OneSequence, Piece, Sequences
from edgekv.serve.engine.blocks import BLOCK, block_hashes
from edgekv.serve.engine.prefixes import Prefixes, Rows
from edgekv.source import Array

ATOL = 0.03  # of logits up to 15, by rounding: tests/backends/test_sequences.py


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[LlamaSequences]:
    opened = open_sequences(tiny_llama, n_parallel=2, n_ctx=256, cache_type="f32", n_threads=1)
    assert isinstance(opened, LlamaSequences)
    yield opened
    opened.close()


def text(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, length)]


def run(engine: Sequences, prefixes: Prefixes, prompt: Sequence[int]) -> tuple[Rows, int, Array]:
    """The rows of a prompt that has been run, how many of them were there already, and its last logits."""
    rows = prefixes.begin(prompt, block_hashes(prompt))
    reused = len(rows.tokens)
    left = prompt[reused:]
    prefixes.make_room(len(left))
    (logits,) = engine.run([Piece(rows.sequence, reused, left, logits=True)])
    prefixes.appended(rows, left)
    return rows, reused, logits


def test_block_hashes_go_on_and_depend_on_all_before() -> None:
    tokens = text(0, 5 * BLOCK + 3)
    hashes = block_hashes(tokens)
    assert len(set(hashes)) == 5
    assert block_hashes(tokens, hashes[:2]) == hashes
    assert block_hashes([*tokens[:-3], 1, 2, 3]) == hashes
    changed = block_hashes([tokens[0] ^ 1, *tokens[1:]])
    assert set(changed).isdisjoint(hashes)


def test_a_prompt_takes_the_longest_beginning_there_is(engine: LlamaSequences) -> None:
    prefixes = Prefixes(engine)
    head, one, two = text(1, 40), text(2, 20), text(3, 20)
    first, reused, _ = run(engine, prefixes, head + one)
    assert reused == 0
    second, reused, _ = run(engine, prefixes, head + two)  # while the first one runs
    assert reused == 40 + next(i for i in range(20) if one[i] != two[i])
    assert prefixes.used_cells == 60 + 60 - reused
    for rows in (first, second):
        prefixes.finish(rows)
    assert prefixes.kept_cells == prefixes.used_cells == 120 - reused
    again, reused, _ = run(engine, prefixes, head + one)  # the same once more: its last token is run
    assert reused == 59
    prefixes.finish(again)
    on, reused, _ = run(engine, prefixes, head + two + text(4, 10))
    assert (reused, on) == (60, second)  # goes on in place
    assert run(engine, prefixes, text(5, 30))[1] == 0


def test_a_running_prompt_takes_what_another_computed_meanwhile(engine: LlamaSequences) -> None:
    prefixes = Prefixes(engine)
    prompt = text(1, 100)
    rows, other = (prefixes.begin(prompt, block_hashes(prompt)) for _ in range(2))
    engine.run([Piece(rows.sequence, 0, prompt[:50], logits=False)])
    prefixes.appended(rows, prompt[:50])
    prefixes.grow(other, prompt, block_hashes(prompt))
    assert other.tokens == prompt[:50]
    assert prefixes.used_cells == 50


def test_least_used_goes_first_and_by_its_end(engine: LlamaSequences) -> None:
    prefixes = Prefixes(engine)
    prompts = [text(seed, 250) for seed in range(2)]
    for prompt in prompts:
        prefixes.finish(run(engine, prefixes, prompt)[0])
    prefixes.finish(run(engine, prefixes, prompts[0][:100])[0])  # now the second is the least used
    new, reused, _ = run(engine, prefixes, text(9, 200))
    assert reused == 0
    assert prefixes.used_cells <= engine.n_cells
    prefixes.finish(new)
    assert run(engine, prefixes, prompts[0])[1] == 249
    assert run(engine, prefixes, prompts[1])[1] == 0


def test_a_thousand_requests_get_their_own_rows(engine: LlamaSequences, tiny_llama: Path) -> None:
    """Prompts that branch off one another at random: logits are those of a lone run, counts those of llama.cpp."""
    prefixes, rng = Prefixes(engine), np.random.default_rng(0)
    lone = open_backend(tiny_llama, n_ctx=256, cache_type="f32", n_threads=1)
    known: list[list[int]] = [text(0, 60)]
    running: list[Rows] = []
    checked = n_reused = 0
    for i in range(1000):
        if len(running) == 2:
            prefixes.finish(running.pop(int(rng.integers(2))), keep=bool(rng.integers(8)))
        base = known[int(rng.integers(len(known)))]
        prompt = base[: int(rng.integers(len(base)))] + text(100 + i, int(rng.integers(1, 40)))
        prompt = prompt[:240]
        known = [*known[-30:], prompt]
        rows, reused, logits = run(engine, prefixes, prompt)
        n_reused += reused
        running.append(rows)
        assert rows.tokens == prompt
        assert prefixes.used_cells <= engine.n_cells
        assert engine._api.llama_memory_seq_pos_max(engine._memory, rows.sequence) == len(prompt) - 1
        if i % 20 == 0:
            lone.trim(0)
            np.testing.assert_allclose(logits, lone.prefill(prompt), rtol=0, atol=ATOL)
            checked += 1
    assert checked == 50
    assert n_reused > 10_000
    lone.close()


def test_nothing_is_left_behind(engine: LlamaSequences) -> None:
    prefixes = Prefixes(engine)
    for seed in range(600):  # more than there are sequences
        rows = prefixes.begin(text(seed, 20), block_hashes(text(seed, 20)))
        prefixes.make_room(20)
        engine.run([Piece(rows.sequence, len(rows.tokens), text(seed, 20)[len(rows.tokens) :], logits=False)])
        prefixes.appended(rows, text(seed, 20)[len(rows.tokens) :])
        prefixes.finish(rows)
    prefixes.make_room(engine.n_cells)
    assert prefixes.used_cells == 0
    assert not prefixes._index
    assert not prefixes._owners


def test_an_engine_of_one_sequence_goes_back_to_where_prompts_part(tiny_llama: Path) -> None:
    opened = open_sequences(tiny_llama, "reference", n_ctx=128)
    assert isinstance(opened, OneSequence)
    prefixes = Prefixes(opened)
    rows, _, _ = run(opened, prefixes, text(1, 40))
    prefixes.finish(rows)
    rows, reused, _ = run(opened, prefixes, text(1, 40)[:30] + text(2, 30))
    assert reused == 30 + (text(1, 40)[30] == text(2, 1)[0])
    prefixes.finish(rows)
    assert run(opened, prefixes, text(3, 100))[1] == 0
