"""Teacher and student side by side on one device: weights in, losses out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgekv.heal.kl import head_kl
from edgekv.heal.recipe import CacheType
from edgekv.heal.torch_blocks import (
    Function,
    GQAWeights,
    MLAWeights,
    match_block,
    rms_norm,
    rope_tables,
    student_block,
    teacher_block,
    without_gradient,
)
from edgekv.rewrite.cache_basis import ATTENTION
from edgekv.source import Array, TensorSource
from edgekv.spec import GQA, MLA

NORMS = ("attn_norm", "ffn_norm", "output_norm")
TRAINED = ATTENTION + NORMS  # trained feed-forwards would make the file several times larger


def attention_kernels() -> AbstractContextManager[None]:
    """Prefer cuDNN's attention (the fastest on Hopper), then flash attention. Open it around training."""
    kind = SDPBackend
    kernels = [kind.CUDNN_ATTENTION, kind.FLASH_ATTENTION, kind.EFFICIENT_ATTENTION, kind.MATH]
    context: AbstractContextManager[None] = sdpa_kernel(kernels, set_priority=True)
    return context


def load_teacher_block(
    source: TensorSource, layer: int, device: torch.device, dtype: torch.dtype
) -> GQAWeights:
    """One block of a GQA model: norms in float32, matrices in `dtype`."""

    def put(kind: torch.dtype, *names: str) -> Tensor:
        arrays = [source.load(f"blk.{layer}.{name}.weight") for name in names]
        return torch.tensor(np.concatenate(arrays), dtype=kind, device=device)

    return GQAWeights(
        attn_norm=put(torch.float32, "attn_norm"),
        qkv=put(dtype, "attn_q", "attn_k", "attn_v"),
        output=put(dtype, "attn_output"),
        ffn_norm=put(torch.float32, "ffn_norm"),
        gate_up=put(dtype, "ffn_gate", "ffn_up"),
        down=put(dtype, "ffn_down"),
    )


def load_teacher(source: TensorSource, device: torch.device, dtype: torch.dtype) -> list[GQAWeights]:
    """All blocks of a GQA model."""
    return [load_teacher_block(source, i, device, dtype) for i in range(source.spec.n_layers)]


class Pair:
    """A GQA teacher and its MLA student.

    `params` are the student's trained tensors: float32, stacked over layers, each with a gradient that is allocated
    at the start. A block works on views of them, so gradients accumulate in place.

    Args:
        source: the teacher.
        spec: the student's attention.
        student: its tensors by the names in ATTENTION (and NORMS if they were trained before), stacked over
            layers; a norm that is missing starts as the teacher's own.
        cache_type: quantized cache to simulate; "f16" simulates none.
        device: where; on CUDA blocks are compiled and run in bfloat16, on a CPU everything is float32. The
            bfloat16 teacher is KL 7e-4 from the float32 one (SmolLM2-135M, argmax equal on 98.8 %).
    """

    def __init__(
        self,
        source: TensorSource,
        spec: MLA,
        student: Mapping[str, Array],
        cache_type: CacheType,
        device: torch.device,
        seq_len: int,
    ) -> None:
        attention = source.spec.layers[0].attention
        assert isinstance(attention, GQA)
        self.device, self.spec, self.teacher_spec = device, spec, attention
        self.eps, self.n_layers = source.spec.norm_eps, source.spec.n_layers
        on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self._teacher = load_teacher(source, device, self.dtype)
        self.embedding = self._put(source.load("token_embd.weight"), torch.float32)
        self._tied = source.spec.tied_embeddings
        name = "token_embd.weight" if self._tied else "output.weight"
        self.head = self._put(source.load(name), torch.float16 if on_gpu else torch.float32)
        self.output_norm = self._put(source.load("output_norm.weight")[None], torch.float32)
        self._load_student(student)
        self.rope_teacher = rope_tables(seq_len, attention.rope.theta, attention.rope.dim, device)
        self.rope_student = rope_tables(seq_len, spec.rope.theta, spec.rope.dim, device)
        self._teacher_block = _compiled(teacher_block(attention, self.eps, self.dtype), on_gpu)
        self._student_block = _compiled(student_block(spec, self.eps, self.dtype, cache_type), on_gpu)
        self._match_block = _compiled(match_block(spec, cache_type), on_gpu)
        self._final_norm = _compiled(rms_norm, on_gpu)
        self._exact_block = student_block(spec, self.eps, torch.float32, cache_type)

    def _put(self, array: Array, dtype: torch.dtype) -> Tensor:
        return torch.tensor(array, dtype=dtype, device=self.device)

    def _load_student(self, student: Mapping[str, Array]) -> None:
        """Fill `params`, and for each block the views of them and of what it shares with the teacher."""
        self.params: dict[str, Tensor] = {}
        views: dict[str, list[Tensor]] = {
            name: [getattr(weights, name) for weights in self._teacher]
            for name in MLAWeights._fields
            if name not in ATTENTION
        }
        views["output_norm"] = list(self.output_norm)
        for name in TRAINED:
            if name in student:
                whole = self._put(student[name], torch.float32)
            else:
                whole = torch.stack(views[name]).to(torch.float32, copy=True)
            whole.grad = torch.zeros_like(whole)
            self.params[name] = whole
            views[name] = list(whole.detach().unbind(0))
            for view, grad in zip(views[name], whole.grad.unbind(0), strict=True):
                view.requires_grad_()
                view.grad = grad
        self._student = [
            MLAWeights(*(views[name][i] for name in MLAWeights._fields)) for i in range(self.n_layers)
        ]
        self._student_norm = views["output_norm"][0]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> residual stream (B, T, D)."""
        return self.embedding[tokens].to(self.dtype)

    @without_gradient
    def teacher_hidden(self, tokens: Tensor) -> Tensor:
        """Normed final hidden states (B, T, D), float32."""
        x = self.embed(tokens)
        for weights in self._teacher:
            x, _, _ = self._teacher_block(x, weights, self.rope_teacher)
        hidden: Tensor = self._final_norm(x, self.output_norm[0], self.eps, torch.float32)
        return hidden

    def student_hidden(self, tokens: Tensor) -> Tensor:
        """Normed final hidden states (B, T, D), float32."""
        x = self.embed(tokens).requires_grad_(torch.is_grad_enabled())  # else block 0 would compile anew
        for weights in self._student:
            x = self._student_block(x, weights, self.rope_student)
        hidden: Tensor = self._final_norm(x, self._student_norm, self.eps, torch.float32)
        return hidden

    def kl_loss(self, tokens: Tensor) -> Tensor:
        """Phase 2: mean KL(teacher || student), nats per token."""
        teacher = self.teacher_hidden(tokens).flatten(0, 1)
        return head_kl(self.student_hidden(tokens).flatten(0, 1), teacher, self.head)

    def match_backward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        """Phase 1: the relative squared error of each layer's attention output, (layers,).

        Adds `scale` times the gradient of their mean, layer by layer, so that memory holds one layer's activations.
        """
        losses = []
        with torch.no_grad():
            x = self.embed(tokens)
        for teacher, student in zip(self._teacher, self._student, strict=True):
            with torch.no_grad():
                x, normed, target = self._teacher_block(x, teacher, self.rope_teacher)
            loss = self._match_block(normed, target, student, self.rope_student)
            (loss * (scale / self.n_layers)).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def exact_head(self) -> Tensor:
        """The output head (vocab, D) in float32; made from 16 bits where it is not the embedding."""
        return self.embedding if self._tied else self.head.float()

    @without_gradient
    def exact_hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The student in float32: normed final states (B, T, D), and the mean square of each layer's latent."""
        x = self.embedding[tokens]
        squares = []
        for weights in self._student:
            normed = rms_norm(x, weights.attn_norm, self.eps, torch.float32)
            latent = normed @ weights.kv_a[: self.spec.kv_lora_rank].float().T
            squares.append(latent.square().mean())
            x = self._exact_block(x, weights, self.rope_student)
        return rms_norm(x, self._student_norm, self.eps, torch.float32), torch.stack(squares)

    @without_gradient
    def set_params(self, tensors: Mapping[str, Array]) -> None:
        """Overwrite trained tensors in place."""
        for name, param in self.params.items():
            param.copy_(torch.tensor(tensors[name]))  # not from_numpy: stored norms are read-only

    def tensors(self) -> dict[str, Array]:
        """Copies of the trained tensors."""
        return {name: param.detach().cpu().numpy().copy() for name, param in self.params.items()}


def _compiled(function: Function, on_gpu: bool) -> Function:
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False) if on_gpu else function
    return compiled
