"""Training loop: two phases, evaluations, checkpoints; stops cleanly and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekv.errors import EdgeKVError
from edgekv.heal.judge import Judge
from edgekv.heal.kl import CHUNK_LOGITS
from edgekv.heal.optimizer import Optimizer, learning_rate
from edgekv.heal.recipe import CurvePoint, Evaluation, HealedRecord, HealRecipe, TrainingStep
from edgekv.heal.state import State, load_state, save_state
from edgekv.heal.teacher_student import Pair, attention_kernels
from edgekv.heal.weights import MEAN_SQUARE, Storage, as_stored, write_healed
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA, ModelSpec
from edgekv.text.shards import TokenStream

HEADROOM = 0.85  # share of the free memory that is planned with; the rest is fragments and workspaces
CURVE_POINTS = 200
EVALUATIONS = 10
CHECKPOINT_S = 120.0
REPORT_S = 2.0
TIMED_STEPS = 4

Report = Callable[[TrainingStep | Evaluation], None]


def saved_bytes_per_token(spec: ModelSpec, attention: MLA) -> int:
    """Bytes of activations that one token keeps for the backward pass, in 16 bits.

    A layer keeps four vectors of width D, q, k, v and the mix of each head, and gate and up of the
    feed-forward; one more layer's worth is in flight.
    """
    heads = attention.n_heads * 2 * (attention.head_dim + attention.value_dim)
    return 2 * (4 * spec.dim + heads + 2 * spec.layers[0].ffn_dim) * (spec.n_layers + 1)


def micro_sequences(
    spec: ModelSpec, attention: MLA, recipe: HealRecipe, trained: int, device: torch.device
) -> int:
    """Sequences in one forward and backward pass; a batch is split into such parts.

    Call it once weights, masters and gradients are on the device; the optimizer's two moments of the
    `trained` values are still to come.
    """
    if device.type != "cuda":
        return recipe.batch_sequences
    free, _ = torch.cuda.mem_get_info(device)
    logits = 3 * 2 * CHUNK_LOGITS  # student, teacher and one in the making
    per_sequence = saved_bytes_per_token(spec, attention) * recipe.seq_len
    fitting = int((HEADROOM * free - logits - 8 * trained) // per_sequence)
    parts = -(-recipe.batch_sequences // max(1, fitting))
    return -(-recipe.batch_sequences // parts)


class Healer:
    """One training: `run` takes it from `record.steps_done` to the end, or to a stop.

    Args:
        source: the teacher.
        start: the student's tensors at `record.steps_done` (edgekv.heal.weights.student_tensors).
        record: recipe and provenance.
        stream: the training text.
        windows: held-out windows (W, T).
        device: "cuda" or "cpu".
        report: receives progress and evaluations.
    """

    def __init__(
        self,
        source: TensorSource,
        start: Mapping[str, Array],
        record: HealedRecord,
        stream: TokenStream,
        windows: NDArray[np.int64],
        device: torch.device,
        report: Report,
    ) -> None:
        recipe = record.recipe
        self.record, self.stream, self.device, self.report = record, stream, device, report
        self.pair = Pair(source, record.attention, start, recipe.cache_type, device, recipe.seq_len)
        self.optimizer = Optimizer(self.pair.params)
        self.judge = Judge(source, windows, device)
        trained = sum(param.numel() for param in self.pair.params.values())
        self.micro = micro_sequences(source.spec, record.attention, recipe, trained, device)
        self.loss_sum = torch.zeros((), device=device)
        self.optimizer_since = record.steps_done  # the step before which its moments knew nothing
        self._stop = False

    def restore(self, path: Path) -> None:
        """Go on from a state file, bit for bit.

        Raises:
            InputError: the file is damaged or belongs to another recipe, model or text.
        """
        state = load_state(path)
        self.record, self.micro = state.record, state.micro_sequences
        self.pair.set_params({name: tensor.numpy() for name, tensor in state.params.items()})
        self.optimizer.load_state(state.optimizer)
        self.optimizer_since = state.optimizer_since
        self.loss_sum = state.loss_sum.to(self.device)

    def measure(self) -> tuple[float, float]:
        """Seconds per step of phase 1 and of phase 2; compiles both, changes nothing."""
        seconds = []
        with attention_kernels():
            for phase in (1, 2):
                for step in range(2):  # with short_len every other step has another shape, compiled apart
                    self._losses(phase, step)
                self._synchronize()
                begin = time.perf_counter()
                for step in range(TIMED_STEPS):
                    self._losses(phase, step)
                self._synchronize()
                seconds.append((time.perf_counter() - begin) / TIMED_STEPS)
        for param in self.pair.params.values():
            assert param.grad is not None
            param.grad.zero_()
        return seconds[0], seconds[1]

    def run(self, state_path: Path, deadline_s: float | None) -> bool:
        """Train to the end; True when it is reached, False after a signal or `deadline_s` seconds.

        The state is saved every two minutes and at a stop.

        Raises:
            EdgeKVError: the loss is no longer finite.
        """
        steps, begin = self.record.recipe.steps, time.monotonic()
        meter = _Meter(self.record.steps_done)
        saved = begin
        with attention_kernels(), self._signals():
            if not self.record.evaluations:
                self.evaluate()
            while self.record.steps_done < steps:
                self._step(meter)
                now = time.monotonic()
                if self._stop or (deadline_s is not None and now - begin > deadline_s):
                    self.save(state_path)
                    return False
                if now - saved > CHECKPOINT_S:
                    self.save(state_path)
                    saved = time.monotonic()
        return True

    def _step(self, meter: _Meter) -> None:
        recipe, step = self.record.recipe, self.record.steps_done
        phase = 1 if step < recipe.match_steps else 2
        first, last = (0, recipe.match_steps) if phase == 1 else (recipe.match_steps, recipe.steps)
        lr = learning_rate(recipe, step, first, last, self.optimizer_since)
        self.loss_sum += self._losses(phase, step)
        self.optimizer.step(lr)
        step += 1
        self.record = dataclasses.replace(self.record, steps_done=step)
        every = max(1, recipe.steps // CURVE_POINTS)
        if step % every == 0 or step == last:
            since = self.record.curve[-1].step if self.record.curve else 0
            loss = float(self.loss_sum) / (step - since)
            self.loss_sum.zero_()
            point = CurvePoint(step, phase, loss)
            self.record = dataclasses.replace(self.record, curve=(*self.record.curve, point))
            self._check(loss)
        if meter.due():
            loss = self.record.curve[-1].loss if self.record.curve else float(self.loss_sum) / step
            self._synchronize()
            rate = meter.rate(step) * recipe.batch_sequences * recipe.seq_len
            eta = (recipe.steps - step) / max(meter.rate(step), 1e-9)
            self.report(TrainingStep(step, recipe.steps, phase, loss, lr, rate, eta))
        if step % max(1, recipe.steps // EVALUATIONS) == 0 or step == last:
            self.evaluate()
            meter.pause(step)

    def _losses(self, phase: int, step: int) -> Tensor:
        """Loss of a step's batch, with its gradient added to the parameters'."""
        recipe, micro = self.record.recipe, self.micro
        tokens = torch.from_numpy(self.stream.tokens(step))
        if recipe.short_len is not None and step % 2:
            tokens = tokens.reshape(-1, recipe.short_len)
            micro *= recipe.seq_len // recipe.short_len
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        total = torch.zeros((), device=self.device)
        for part in tokens.split(micro):
            share = len(part) / len(tokens)
            if phase == 1:
                total += self.pair.match_backward(part, share).mean() * share
            else:
                loss = self.pair.kl_loss(part) * share
                loss.backward()
                total += loss.detach()
        return total

    def evaluate(self) -> Array:
        """Score the student as it is now, report it and put it on record; its latents' MEAN_SQUARE (layers,)."""
        found, squares = self.judge.evaluate(self.pair, self.record.steps_done)
        self.record = dataclasses.replace(self.record, evaluations=(*self.record.evaluations, found))
        self.report(found)
        return np.asarray(squares.cpu().numpy())

    def _check(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise EdgeKVError(
                f"the loss is {loss} at step {self.record.steps_done}: the training diverged; "
                f"start again with a lower --lr than {self.record.recipe.lr:g}"
            )

    def save(self, path: Path) -> None:
        """Write the state that `restore` reads."""
        progress = (self.record, self.micro, self.optimizer_since)
        save_state(path, State(*progress, self.pair.params, self.optimizer.state(), self.loss_sum))

    def write(self, path: Path, storage: Storage) -> None:
        """Write the healed tensors over `path` and score them as they are stored; the student keeps the rounding."""
        tensors = self.pair.tensors()
        self.pair.set_params(as_stored(tensors, storage))
        with attention_kernels():
            tensors[MEAN_SQUARE] = self.evaluate()
        write_healed(path, tensors, self.record, storage, force=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop after the step at hand; a second one stops at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(number, before[signal.Signals(number)])

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Meter:
    """Steps per second since the last pause, and when the next report is due."""

    def __init__(self, step: int) -> None:
        self.pause(step)
        self._reported = self._begin

    def pause(self, step: int) -> None:
        self._first, self._begin = step, time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._reported < REPORT_S:
            return False
        self._reported = time.monotonic()
        return True

    def rate(self, step: int) -> float:
        return (step - self._first) / max(time.monotonic() - self._begin, 1e-9)
