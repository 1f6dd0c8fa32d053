"""Optimizer and learning-rate schedule."""

import itertools

import pytest
import torch

from edgekv.heal.optimizer import WARMUP_STEPS, Optimizer, learning_rate, orthogonalize
from edgekv.heal.recipe import HealRecipe


def test_newton_schulz_brings_singular_values_near_one():
    matrices = torch.randn(4, 3, 40, 12, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(batch))
        assert values.min() > 0.6
        assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (orthogonalize(matrices) * (left @ right)).sum((-1, -2)) / 12
    assert cosine.min() > 0.8  # it points where the exact polar factor points


def test_the_rate_warms_up_and_falls_in_each_phase():
    recipe = HealRecipe(steps=1000, lr=1e-3)
    rates = [learning_rate(recipe, step, 150, 1000) for step in range(150, 1000)]
    assert rates[0] == pytest.approx(1e-3 / WARMUP_STEPS, rel=0.01)
    assert max(rates) <= 1e-3
    assert max(rates) > 0.99e-3
    assert rates[-1] < 1e-5
    assert all(a >= b for a, b in itertools.pairwise(rates[WARMUP_STEPS:]))


def test_an_optimizer_that_starts_late_warms_up_late():
    recipe = HealRecipe(steps=1000, lr=1e-3)
    late, early = (learning_rate(recipe, 500, 150, 1000, since) for since in (500, 0))
    assert late == pytest.approx(early / WARMUP_STEPS)
    done = 500 + WARMUP_STEPS
    assert learning_rate(recipe, done, 150, 1000, 500) == learning_rate(recipe, done, 150, 1000)


def parameters() -> dict[str, torch.Tensor]:
    """A matrix, which Muon updates, and a norm, which AdamW updates; each with a gradient to add to."""
    found = {"matrix": torch.ones(2, 8, 6), "norm": torch.ones(2, 6)}
    for param in found.values():
        param.grad = torch.zeros_like(param)
    return found


def test_a_least_squares_problem_is_solved(monkeypatch):
    monkeypatch.setattr("edgekv.heal.optimizer.GRADIENT_NORM", 1e9)
    generator = torch.Generator().manual_seed(0)
    goal, x = torch.randn(2, 8, 6, generator=generator), torch.randn(2, 6, 64, generator=generator)
    scale = torch.rand(2, 6, generator=generator) + 0.5
    params = parameters()
    matrix, norm = (param.detach().requires_grad_() for param in params.values())
    matrix.grad, norm.grad = (param.grad for param in params.values())
    optimizer = Optimizer(params)
    for step in range(300):
        ((matrix - goal) @ x).square().mean().backward()
        ((norm - scale)[..., None] * x).square().mean().backward()
        optimizer.step(0.15 * (1 - step / 300))
    assert (params["matrix"] - goal).abs().max() < 0.02
    assert (params["norm"] - scale).abs().max() < 0.02
    assert not any(param.grad.any() for param in params.values())


def test_a_restored_optimizer_goes_on_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    gradients = [
        {name: torch.randn(p.shape, generator=generator) for name, p in parameters().items()}
        for _ in range(6)
    ]
    whole, stopped = parameters(), parameters()

    def train(
        optimizer: Optimizer, params: dict[str, torch.Tensor], steps: list[dict[str, torch.Tensor]]
    ) -> None:
        for step in steps:
            for name, gradient in step.items():
                params[name].grad.copy_(gradient)
            optimizer.step(1e-2)

    train(Optimizer(whole), whole, gradients)
    early = Optimizer(stopped)
    train(early, stopped, gradients[:3])
    late = Optimizer(stopped)
    late.load_state({name: tensor.clone() for name, tensor in early.state().items()})
    train(late, stopped, gradients[3:])
    for name in whole:
        assert torch.equal(whole[name], stopped[name]), name


def test_gradients_are_clipped_together():
    params = parameters()
    for param in params.values():
        param.grad.fill_(100.0)
    assert Optimizer(params).step(0.0).item() == pytest.approx(100 * (2 * 8 * 6 + 2 * 6) ** 0.5)
