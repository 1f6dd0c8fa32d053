"""Judge of a training: the student against the float32 teacher on held-out windows, on the training device.

Protocol: windows without a first special token; of T tokens those in the second half are scored, the
first scored prediction being made at position T/2, as llama.cpp's perplexity tool does.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekv.heal.recipe import Evaluation
from edgekv.heal.teacher_student import Pair, load_teacher_block
from edgekv.heal.torch_blocks import rms_norm, rope_tables, teacher_block, without_gradient
from edgekv.source import TensorSource
from edgekv.spec import GQA

WINDOWS_AT_ONCE = 8


class Judge:
    """Holds the teacher's final hidden states on the windows (W, T), computed once, block by block."""

    def __init__(self, source: TensorSource, windows: NDArray[np.int64], device: torch.device) -> None:
        self.windows = torch.from_numpy(windows).to(device)
        self.first = windows.shape[1] // 2
        self._teacher = _teacher_hidden(source, self.windows, device)[:, self.first : -1].clone()

    @without_gradient
    def evaluate(self, pair: Pair, step: int) -> tuple[Evaluation, Tensor]:
        """The student's loss, and the mean square of each layer's latent, (layers,)."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.windows.device)
        squares = []
        head = pair.exact_head()
        for start in range(0, len(self.windows), WINDOWS_AT_ONCE):
            batch = slice(start, start + WINDOWS_AT_ONCE)
            tokens = self.windows[batch]
            hidden, square = pair.exact_hidden(tokens)
            squares.append(square * len(tokens))
            for i in range(len(tokens)):
                sums += _score(
                    hidden[i, self.first : -1] @ head.T,
                    self._teacher[batch][i] @ head.T,
                    tokens[i, self.first + 1 :],
                )
        scored = len(self.windows) * (self.windows.shape[1] - self.first - 1)
        nll, teacher_nll, kl, agree = (float(value) for value in sums / scored)
        found = Evaluation(step, math.exp(nll), math.exp(teacher_nll), kl, agree, scored)
        return found, torch.stack(squares).sum(0) / len(self.windows)


def _score(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions of: student NLL, teacher NLL, KL(teacher || student), equal argmax."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    nll = -log_s.gather(-1, targets[:, None]).double().sum()
    teacher_nll = -log_t.gather(-1, targets[:, None]).double().sum()
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).double().sum()
    agree = (log_s.argmax(-1) == log_t.argmax(-1)).double().sum()
    return torch.stack((nll, teacher_nll, kl, agree))


@without_gradient
def _teacher_hidden(source: TensorSource, windows: Tensor, device: torch.device) -> Tensor:
    """Normed final hidden states (W, T, D) in float32, with one block's weights on the device at once."""
    spec = source.spec
    attention = spec.layers[0].attention
    assert isinstance(attention, GQA)
    block = teacher_block(attention, spec.norm_eps, torch.float32)
    rope = rope_tables(windows.shape[1], attention.rope.theta, attention.rope.dim, device)
    x = torch.tensor(source.load("token_embd.weight"), device=device)[windows]
    for i in range(spec.n_layers):
        weights = load_teacher_block(source, i, device, torch.float32)
        for start in range(0, len(x), WINDOWS_AT_ONCE):
            batch = slice(start, start + WINDOWS_AT_ONCE)
            x[batch] = block(x[batch], weights, rope)[0]
    norm = torch.tensor(source.load("output_norm.weight"), device=device)
    return rms_norm(x, norm, spec.norm_eps, torch.float32)
