"""KL(teacher || student) over the whole vocabulary without holding the logits of a whole batch.

As in Liger-Kernel's fused linear losses (arXiv 2410.10989): chunk by chunk, both models' logits are
computed, then the KL and, already in the forward pass, the gradient with respect to the student's hidden
states. The head is frozen, so nothing else is kept: memory is two chunks of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 4 * 10**8  # logits of one chunk: 0.8 GB in 16 bits, twice (student and teacher)


def kl_rows_(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row, (T,) float32; `student` becomes softmax(s) - softmax(t)."""
    if student.is_cuda:
        from edgekv.heal import kl_triton

        return kl_triton.kl_rows_(student, teacher)
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    p_t = log_t.exp()
    student.copy_(log_s.exp() - p_t)
    return (p_t * (log_t - log_s)).sum(-1)


def chunk_rows(n_vocab: int, n_tokens: int) -> int:
    """Tokens per chunk: as many as CHUNK_LOGITS allows, in multiples of 1024 where there are that many."""
    rows = max(CHUNK_LOGITS // n_vocab, 1)
    return min(n_tokens, rows // 1024 * 1024 if rows >= 1024 else rows)


class _HeadKL(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        n_tokens = student.shape[0]
        step = chunk_rows(head.shape[0], n_tokens)
        grad = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, n_tokens, step):
            rows = slice(start, start + step)
            logits = student[rows].to(head.dtype) @ head.T
            total += kl_rows_(logits, teacher[rows].to(head.dtype) @ head.T).sum()
            grad[rows] = logits @ head
        ctx.save_for_backward(grad)
        return total / n_tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * (grads[0] / grad.shape[0]), None, None


def head_kl(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats per token.

    student, teacher (T, D) are normed final hidden states in float32, so that a gradient divided by the
    number of tokens does not underflow. head (vocab, D) sets the type of the logits; on CUDA that is
    float16: logits need its three more mantissa bits, and they are far from its largest value.
    """
    loss: Tensor = _HeadKL.apply(student, teacher, head)
    return loss
