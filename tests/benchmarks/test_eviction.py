"""The benchmark of policies: the rows of its table, by hand-made scores, in the form that tables.py reads."""

import argparse
import importlib.util
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgekv.evaluate.model_under_test import ModelUnderTest, read_tokenizer
from edgekv.evaluate.ruler.tasks import AskedQuestion, AskedTask

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_policies_choose_of_the_same_rows_and_answer_from_their_own(tiny_llama: Path) -> None:
    """What a setting keeps is what the policy keeps when nothing ran in between, the question its own or not."""
    eviction = load("eviction")
    tokens = [int(token) for token in np.random.default_rng(5).integers(0, 250, 300)]
    question = AskedQuestion(tokens[200:220], tokens[220:224], ("never",), limit=8)
    task = AskedTask("qa_1", 224, tokens[:200], (question, question))
    policies = ("snapkv", "critical-expected", "keydiff")
    settings = [eviction.Setting(policy, 0.5, seen) for seen in (False, True) for policy in policies]
    subject = ModelUnderTest(tiny_llama, cache_type="f32")
    backend, possible = eviction.opened(subject, 1, 320, [*settings, eviction.Setting("h2o", 0.5, True)])
    assert possible == settings
    found = eviction.ask(backend, settings, task, read_tokenizer(tiny_llama))
    assert set(found) == {"all rows", *(setting.key for setting in settings)}
    assert all(len(scores) == 2 for scores in found.values())

    def kept(setting: Any, n_cached: int) -> Any:
        backend.trim(0)
        backend.prefill(tokens[:200])
        if n_cached > 200:
            backend.prefill(tokens[200:n_cached])
        return eviction.choices(backend, [setting], task)[setting.key]

    for n_cached, group in ((200, settings[:3]), (220, settings[3:])):
        backend.trim(0)
        backend.prefill(tokens[:200])
        backend.prefill(tokens[200:n_cached]) if n_cached > 200 else None
        together = eviction.choices(backend, group, task)
        for setting in group:
            np.testing.assert_array_equal(together[setting.key], kept(setting, n_cached))
            assert len(together[setting.key]) == 100
    backend.close()


def test_rows_and_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds, of which the second has a second question; two samples of each."""
    eviction, tables = load("eviction"), load("tables")
    half = eviction.Setting("keydiff", 0.5, False)
    found = [
        {"all rows": [1.0], half.key: [1.0]},
        {"all rows": [1.0, 1.0], half.key: [0.0, 1.0]},
        {"all rows": [0.5], half.key: [0.0]},
        {"all rows": [1.0, 0.0], half.key: [1.0, 0.0]},
    ]
    rows = eviction.table(
        "tiny", "f16", found, ("vt", "qa_1"), [half, eviction.Setting("tova", 0.5, True)], 1000
    )
    assert [row["policy"] for row in rows] == ["all rows", "keydiff"]  # tova was not measured
    whole, cut = rows
    assert (whole["score"]["mean"], whole["again"]["mean"], whole["change"]) == (87.5, 50.0, None)
    assert (cut["score"]["mean"], cut["again"]["mean"], cut["nbytes"]) == (50.0, 50.0, 500)
    assert cut["kinds"] == {"vt": 50.0, "qa_1": 50.0}
    assert cut["change"] == {
        "mean": -37.5,
        "se": pytest.approx(100 * (0.25**2 + 0.5**2) ** 0.5 / 2, abs=0.05),
    }

    monkeypatch.setattr(sys, "argv", ["benchmarks/eviction.py", "tiny.gguf"])
    wanted = argparse.Namespace(length=1024, samples=2, kinds="vt,qa_1", seed=0)
    result = json.loads(eviction.document(rows, wanted), parse_float=Decimal)
    assert result["command"] == ["python benchmarks/eviction.py tiny.gguf"]
    assert (
        "| tiny | f16 | keydiff | 0.5 | not seen | 50.0 ± 35.4 | -37.5 ± 28.0 | 50.0 ± 50.0 | 500 |"
        in tables.table(result)
    )
