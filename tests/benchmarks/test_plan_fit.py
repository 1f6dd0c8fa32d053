"""The speed model's coefficients: fitted on public rows, and judged on rows that the fit never saw."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgekv.devices.predict.speed import load_coefficients

SCRIPT = Path(__file__).parents[2] / "benchmarks/plan/fit.py"


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("plan_fit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_fit"] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def test_the_shipped_coefficients_are_the_fit(fit: ModuleType) -> None:
    assert fit.fit(fit.load_rows(fit.ROWS)) == load_coefficients()


def test_decode_speed_of_public_rows_that_the_fit_never_saw(fit: ModuleType) -> None:
    errors = fit.decode_errors([row for row in fit.load_rows(fit.ROWS) if not row.train], load_coefficients())
    assert len(errors) > 120
    median, worst = fit.summary(errors)
    assert median <= 0.15
    assert worst <= 0.35


def test_rk3588_and_most_cards_are_not_in_the_fit(fit: ModuleType) -> None:
    trained = {row.board.key for row in fit.load_rows(fit.ROWS) if row.train}
    tested = {row.board.key for row in fit.load_rows(fit.ROWS) if not row.train}
    assert {"orange-pi-5", "rtx-4090", "rtx-3080", "h100-80gb-pcie"} <= tested - trained
