"""The comparison of two models, against figures computed in float64 from all logits at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.reference import ReferenceBackend
from edgekv.evaluate.verify import CHUNK, compare, sample_tokens
from edgekv.models.open import open_model


@pytest.fixture
def pair(tiny_llama: Path, tiny_mla: Path) -> tuple[ReferenceBackend, ReferenceBackend]:
    return ReferenceBackend(open_model(tiny_llama), 256), ReferenceBackend(open_model(tiny_mla), 256)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("n", [2, CHUNK, CHUNK + 1, 150])
def test_figures_are_what_they_are_called(pair: tuple[ReferenceBackend, ReferenceBackend], n: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, n).tolist()
    steps: list[tuple[int, int]] = []
    found = compare(*pair, tokens, lambda done, total: steps.append((done, total)))
    for model in pair:
        assert model.n_past == n
        model.trim(0)
    logits_a, logits_b = (model.prefill_all(tokens) for model in pair)
    a, b = log_probabilities(logits_a), log_probabilities(logits_b)
    kl = (np.exp(a) * (a - b)).sum(-1)
    rows, following = np.arange(n - 1), tokens[1:]
    assert found.tokens == n
    assert found.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_se == pytest.approx(kl.std(ddof=1) / len(kl) ** 0.5, rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-3)
    assert found.max_logit_error == pytest.approx(np.abs(logits_a - logits_b).max(), rel=1e-3)
    assert found.argmax_agreement == (logits_a.argmax(-1) == logits_b.argmax(-1)).mean()
    assert found.ppl_a == pytest.approx(np.exp(-a[rows, following].mean()), rel=1e-3)
    assert found.ppl_b == pytest.approx(np.exp(-b[rows, following].mean()), rel=1e-3)
    assert found.kl > 0.01, "two models that differ"
    assert steps[-1] == (n, n)


def test_a_model_equals_itself(tiny_llama: Path) -> None:
    a, b = (ReferenceBackend(open_model(tiny_llama), 64) for _ in range(2))
    found = compare(a, b, list(range(40)), lambda *_: None)
    assert (found.kl, found.kl_max, found.max_logit_error, found.argmax_agreement) == (0, 0, 0, 1)
    assert found.ppl_a == found.ppl_b


def test_sampled_tokens_are_the_models_own(pair: tuple[ReferenceBackend, ReferenceBackend]) -> None:
    model = pair[0]
    tokens = sample_tokens(model, 100, seed=3)
    assert model.n_past == 0
    assert tokens == sample_tokens(model, 100, seed=3) != sample_tokens(model, 100, seed=4)
    log = log_probabilities(model.prefill_all(tokens))
    chosen = -log[np.arange(99), tokens[1:]].mean()
    entropy = -(np.exp(log) * log).sum(-1).mean()
    assert chosen == pytest.approx(entropy, abs=0.5), "drawn from its distribution, neither greedy nor blind"
