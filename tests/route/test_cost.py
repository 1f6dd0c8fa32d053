"""The cost of each way, the choice, and the fit of coefficients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgekv.route.cost import Link, Prefill, Question, Site, cheapest, fetch_cost, local_cost, route_cost
from edgekv.route.fit import Measurements, fitted

GIGABIT, WIFI, BAD = Link(0.0005, 117e6), Link(0.004, 5e6), Link(0.2, 2e4)
BOARD = Site(Prefill(0.01, 0.01, 1e-6), 0.05, save_s=1e-9, load_s=1e-9)
LATENT = Question(2000, 32, 8000, 4320)
GQA = replace(LATENT, row_nbytes=23040)


def ways(question: Question, link: Link, here: Site, there: Site, held: int) -> dict[str, float]:
    costs = {
        "local": local_cost(question, here, 0),
        "fetch": fetch_cost(question, link, there, here, held),
        "route": route_cost(question, link, there, held),
    }
    assert cheapest(costs) == min(costs, key=lambda way: costs[way].total_s)  # type: ignore[arg-type, index, type-var]
    return {way: cost.total_s for way, cost in costs.items()}


@pytest.mark.parametrize(
    ("question", "link", "there", "held", "best"),
    [
        (LATENT, GIGABIT, BOARD, 2000, "route"),
        (LATENT, GIGABIT, replace(BOARD, wait_s=5.0), 2000, "fetch"),  # it is busy, but its rows are small
        (LATENT, GIGABIT, replace(BOARD, decode_s=0.2), 2000, "fetch"),  # it answers slowly
        (LATENT, WIFI, replace(BOARD, wait_s=5.0), 2000, "fetch"),
        (
            GQA,
            Link(0.004, 2e6),
            replace(BOARD, wait_s=30.0),
            2000,
            "local",
        ),  # 46 MB take longer than the prefill
        (LATENT, BAD, replace(BOARD, wait_s=30.0), 2000, "local"),
        (LATENT, BAD, BOARD, 2000, "route"),  # a question is 8 kB wherever it goes
        (LATENT, GIGABIT, BOARD, 0, "local"),
    ],
)
def test_the_choice(question: Question, link: Link, there: Site, held: int, best: str) -> None:
    costs = ways(question, link, BOARD, there, held)
    assert min(costs, key=lambda way: costs[way]) == best, costs


def test_costs_are_the_sums_of_their_terms() -> None:
    cost = fetch_cost(LATENT, WIFI, BOARD, BOARD, 1984)
    nbytes = 1984 * 4320
    compute = 0.01 + 16 * 0.01 + 1e-6 * 16 * (1984 + 8)
    assert cost.first_token_s == pytest.approx(0.004 + nbytes / 5e6 + nbytes * 2e-9 + compute)
    assert cost.total_s == pytest.approx(cost.first_token_s + 32 * 0.05)
    whole = local_cost(LATENT, BOARD, 2000)  # of a prompt that is cached whole the last token is run
    assert whole.compute_s == pytest.approx(0.01 + 0.01 + 1e-6 * 1999.5)


def test_coefficients_are_found_again_from_noisy_seconds() -> None:
    rng = np.random.default_rng(0)
    truth = Prefill(0.02, 0.003, 2e-6)
    points = [(int(n), int(d)) for n, d in rng.integers(1, [512, 6000], (200, 2))]
    seconds = np.array([truth.seconds(*point) for point in points]) * rng.uniform(0.95, 1.05, 200)
    found = Prefill(*fitted(np.array([Prefill.terms(*point) for point in points[:100]]), seconds[:100]))
    errors = [
        abs(found.seconds(*point) / s - 1) for point, s in zip(points[100:], seconds[100:], strict=True)
    ]
    assert np.median(errors) < 0.05


def test_no_coefficient_is_negative() -> None:
    sizes = np.array([1e5, 2e5, 4e5, 8e5])
    seconds = sizes / 1e7 * np.array([0.9, 1.0, 1.05, 1.1])  # a line would start below 0
    round_trip_s, byte_s = fitted(np.stack([np.ones(4), sizes], axis=1), seconds)
    assert round_trip_s == 0.0
    assert 1 / byte_s == pytest.approx(1e7, rel=0.1)


def test_measurements_follow_what_is_measured() -> None:
    seen = Measurements((0.5, 0.0))
    assert seen.coefficients == (0.5, 0.0)
    seen.add((1.0, 0.0), 0.0)  # a clock that stood still
    assert seen.coefficients == (0.5, 0.0)
    for _ in range(600):
        seen.add((1.0, 10.0), 1.0)
    for n in range(256):
        seen.add((1.0, n), 0.1 + 0.01 * n)
    assert seen.coefficients == pytest.approx((0.1, 0.01), rel=1e-3)
