"""The sampler: draws come from the softmax, prompts stay, and each step sees what was drawn before."""

from __future__ import annotations

import numpy as np
import pytest

from edgekv.progress import ignore
from edgekv.reference.sample import draw, write_on


def test_draws_come_from_the_softmax() -> None:
    logits = np.array([3.0, 1.0, 2.0, -np.inf, 0.0], np.float32)
    n = 20000
    counts = np.bincount(draw(np.tile(logits, (n, 1)), np.random.default_rng(0)), minlength=5)
    p = np.exp(logits) / np.exp(logits).sum()
    assert counts[3] == 0
    np.testing.assert_allclose(counts / n, p, atol=4 * np.sqrt(p.max() * (1 - p.max()) / n))


def test_one_row_and_many_draw_alike() -> None:
    logits = np.random.default_rng(1).standard_normal((1, 50)).astype(np.float32)
    one = [int(draw(logits[0], np.random.default_rng(seed))) for seed in range(20)]
    assert one == [int(draw(logits, np.random.default_rng(seed))[0]) for seed in range(20)]


def test_prompts_stay_and_each_step_is_given_the_token_before() -> None:
    """A model that counts: after token t comes t + 2, for certain."""
    seen: list[tuple[list[int], int]] = []
    told: list[tuple[int, int]] = []

    def step(tokens: np.ndarray, position: int) -> np.ndarray:
        seen.append((tokens.tolist(), position))
        logits = np.full((len(tokens), 100), -np.inf, np.float32)
        logits[np.arange(len(tokens)), tokens + 2] = 0
        return logits

    prompts = np.array([[7, 1], [8, 20]])
    found = write_on(
        step, prompts, 5, np.random.default_rng(0), lambda done, total: told.append((done, total))
    )
    assert found.tolist() == [[7, 1, 3, 5, 7], [8, 20, 22, 24, 26]]
    assert seen == [([7, 8], 0), ([1, 20], 1), ([3, 22], 2), ([5, 24], 3)]
    assert told == [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize("given", [3, 4])
def test_a_prompt_as_long_as_the_window_is_left_as_it_is(given: int) -> None:
    prompts = np.arange(2 * given).reshape(2, given)
    step = lambda tokens, _: np.zeros((len(tokens), 9), np.float32)  # noqa: E731
    np.testing.assert_array_equal(write_on(step, prompts, given, np.random.default_rng(0), ignore), prompts)
