"""Optimizers and schedules."""

import itertools

import pytest
import torch

from edgekv.heal.optimizer import Optimizer, learning_rate, orthogonalize
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


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_warms_up_and_falls_in_each_phase(schedule):
    recipe = HealRecipe(steps=1000, lr=1e-3, warmup=20, schedule=schedule, decay_share=0.3)
    rates = [learning_rate(recipe, step, 150, 1000) for step in range(150, 1000)]
    assert rates[0] == pytest.approx(1e-3 / 20, rel=0.01)
    assert max(rates) <= 1e-3
    assert max(rates) > 0.99e-3
    assert rates[-1] < 1e-5
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_an_optimizer_that_starts_late_warms_up_late():
    recipe = HealRecipe(steps=1000, lr=1e-3, warmup=20)
    assert learning_rate(recipe, 500, 150, 1000, 500) == pytest.approx(
        learning_rate(recipe, 500, 150, 1000) / 20
    )
    assert learning_rate(recipe, 520, 150, 1000, 500) == learning_rate(recipe, 520, 150, 1000)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_least_squares_problem_is_solved(kind):
    generator = torch.Generator().manual_seed(0)
    goal, x = torch.randn(2, 8, 6, generator=generator), torch.randn(2, 6, 64, generator=generator)
    weight = torch.zeros(2, 8, 6)
    weight.grad = torch.zeros_like(weight)
    leaf = weight.detach().requires_grad_()
    leaf.grad = weight.grad
    optimizer = Optimizer({"w": weight}, HealRecipe(steps=300, optimizer=kind, grad_clip=1e9))
    for step in range(300):
        ((leaf - goal) @ x).square().mean().backward()
        optimizer.step(0.15 * (1 - step / 300))
    assert (weight - goal).abs().max() < 0.02
    assert not weight.grad.any()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind):
    def parameter() -> torch.Tensor:
        weight = torch.ones(2, 4, 4)
        weight.grad = torch.zeros_like(weight)
        return weight

    gradients = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    recipe = HealRecipe(steps=6, optimizer=kind)
    whole, first = parameter(), parameter()
    optimizer, early = Optimizer({"w": whole}, recipe), Optimizer({"w": first}, recipe)
    for gradient in gradients:
        whole.grad.copy_(gradient)
        optimizer.step(1e-2)
    for gradient in gradients[:3]:
        first.grad.copy_(gradient)
        early.step(1e-2)
    late = Optimizer({"w": first}, recipe)
    late.load_state({name: tensor.clone() for name, tensor in early.state().items()})
    for gradient in gradients[3:]:
        first.grad.copy_(gradient)
        late.step(1e-2)
    assert torch.equal(whole, first)


def test_gradients_are_clipped_together():
    weights = {name: torch.zeros(3, 3) for name in "ab"}
    for weight in weights.values():
        weight.grad = torch.full((3, 3), 100.0)
    optimizer = Optimizer(weights, HealRecipe(steps=1, grad_clip=1.0))
    assert optimizer.step(0.0).item() == pytest.approx(100 * 18**0.5)
