"""Optimizer over tensors stacked by layer (Muon, AdamW for norms), and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from edgekv.heal.recipe import HealRecipe
from edgekv.heal.torch_blocks import without_gradient

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of arXiv 2502.16982, section 2.1
WARMUP_STEPS = 50
GRADIENT_NORM = 1.0  # gradients are clipped to it, all together


def learning_rate(recipe: HealRecipe, step: int, first: int, last: int, optimizer_since: int = 0) -> float:
    """Rate of a step in the phase [first, last): linear warm-up, then a cosine down to 0.

    An optimizer that started in the middle, at `optimizer_since`, warms up there too.
    """
    done, length = step - first, last - first
    warm_steps = max(1, min(WARMUP_STEPS, length // 10))
    warm = min(1.0, (min(done, step - optimizer_since) + 1) / warm_steps)
    return recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * done / length))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of (..., m, n), by Newton-Schulz iteration: singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, orthogonalized (arXiv 2502.16982): every direction of a matrix moves alike.

    Works on (layers, ..., m, n) stacks, each trailing matrix on its own. The update has the RMS of an
    AdamW update (factor 0.2 * sqrt(max(m, n))), so one learning rate serves both.
    """

    def __init__(self, params: list[Tensor], momentum: float = 0.95) -> None:
        self.params = params
        self.momentum = momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @without_gradient
    def step(self, lr: float) -> None:
        for param, buffer in zip(self.params, self.buffers, strict=True):
            assert param.grad is not None
            buffer.lerp_(param.grad, 1 - self.momentum)
            update = orthogonalize(param.grad.lerp(buffer, self.momentum))
            param.add_(update, alpha=-lr * 0.2 * math.sqrt(max(param.shape[-2:])))


class Optimizer:
    """Muon for matrices, AdamW for norms: the parameters that have fewer than three axes, layers included."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = dict(params)
        self._muon_names = [name for name, param in params.items() if param.ndim >= 3]
        self._adam_names = [name for name in params if name not in self._muon_names]
        self._muon = Muon([params[name] for name in self._muon_names])
        norms = [params[name] for name in self._adam_names]
        self._adam = torch.optim.AdamW(
            norms, betas=(0.9, 0.95), weight_decay=0.0, fused=any(norm.is_cuda for norm in norms)
        )

    def step(self, lr: float) -> Tensor:
        """Clip, update, clear the gradients; the gradient's norm before clipping."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        torch.nn.utils.clip_grads_with_norm_(list(self.params.values()), GRADIENT_NORM, norm)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._muon.step(lr)
        torch._foreach_zero_(grads)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Tensors to save, by name; the parameters themselves are not among them."""
        saved = {f"muon.{n}": b for n, b in zip(self._muon_names, self._muon.buffers, strict=True)}
        for name in self._adam_names:
            for key, value in self._adam.state[self.params[name]].items():
                saved[f"adam.{name}.{key}"] = value
        return saved

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, buffer in zip(self._muon_names, self._muon.buffers, strict=True):
            buffer.copy_(saved[f"muon.{name}"])
        for name in self._adam_names:
            param, prefix = self.params[name], f"adam.{name}."
            self._adam.state[param] = {
                key.removeprefix(prefix): value.to(
                    "cpu" if key.endswith(".step") and not param.is_cuda else param.device
                )
                for key, value in saved.items()
                if key.startswith(prefix)
            }
