"""KL divergence of logit rows and its gradient, as one Triton kernel (CUDA only).

One program per row. The first pass keeps running maxima and sums per lane, so that nothing crosses threads
inside the loop; the second pass reads the row again, mostly from L2, and overwrites the student's logits
with the gradient. Device memory moves 4 times 2 bytes per logit; a float32 log-softmax in PyTorch moves 60.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _kl_rows(student, teacher, kl, n_vocab: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * n_vocab
    lanes = tl.arange(0, BLOCK)
    max_s = tl.full((BLOCK,), -1e30, tl.float32)
    max_t = tl.full((BLOCK,), -1e30, tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)  # sum of exp(t - max_t) * (t - s)
    for start in range(0, n_vocab, BLOCK):
        inside = start + lanes < n_vocab
        s = tl.load(student + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(inside, s, -1e30)
        t = tl.where(inside, t, -1e30)
        new_s = tl.maximum(max_s, s)
        new_t = tl.maximum(max_t, t)
        sum_s = sum_s * tl.exp(max_s - new_s) + tl.exp(s - new_s)
        shrink, e_t = tl.exp(max_t - new_t), tl.exp(t - new_t)
        sum_t = sum_t * shrink + e_t
        cross = cross * shrink + e_t * (t - s)
        max_s, max_t = new_s, new_t
    top_s, top_t = tl.max(max_s, 0), tl.max(max_t, 0)
    weight = tl.exp(max_t - top_t)
    total_t = tl.sum(sum_t * weight, 0)
    log_s = top_s + tl.log(tl.sum(sum_s * tl.exp(max_s - top_s), 0))
    log_t = top_t + tl.log(total_t)
    tl.store(kl + tl.program_id(0), tl.sum(cross * weight, 0) / total_t - log_t + log_s)
    for start in range(0, n_vocab, BLOCK):
        inside = start + lanes < n_vocab
        s = tl.load(student + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher + row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        grad = tl.exp(s - log_s) - tl.exp(t - log_t)
        tl.store(student + row + start + lanes, grad.to(student.dtype.element_ty), mask=inside)


def kl_rows_(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row, (T,) float32; `student` becomes softmax(s) - softmax(t).

    Both are contiguous CUDA tensors (T, vocab) of one 16-bit or float32 type.
    """
    assert student.is_contiguous()
    assert teacher.is_contiguous()
    assert student.shape == teacher.shape
    rows, n_vocab = student.shape
    kl = torch.empty(rows, dtype=torch.float32, device=student.device)
    _kl_rows[(rows,)](student, teacher, kl, n_vocab, BLOCK=2048, num_warps=8)
    return kl
