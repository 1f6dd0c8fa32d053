"""The chunked KL against autograd over whole float64 logits."""

import pytest
import torch

from edgekv.heal import kl as loss_module
from edgekv.heal.kl import chunk_rows, head_kl


@pytest.mark.parametrize("chunk_logits", [10**9, 300 * 7, 1])
def test_loss_and_gradient(monkeypatch, chunk_logits):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 16, generator=generator)
    student = (teacher + torch.randn(50, 16, generator=generator) * 0.5).requires_grad_()
    head = torch.randn(300, 16, generator=generator)
    found = head_kl(student, teacher, head)
    (3 * found).backward()

    again = student.detach().double().requires_grad_()
    log_s = (again @ head.double().T).log_softmax(-1)
    log_t = (teacher.double() @ head.double().T).log_softmax(-1)
    expected = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    (3 * expected).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), again.grad, rtol=1e-4, atol=1e-6)


def test_equal_hidden_states_have_no_loss():
    x = torch.randn(5, 8)
    assert head_kl(x, x, torch.randn(20, 8)).item() == pytest.approx(0, abs=1e-6)


def test_chunks_stay_below_the_limit():
    assert chunk_rows(49152, 32768) == 7168
    assert chunk_rows(128256, 32768) == 3072
    assert chunk_rows(300, 20) == 20
