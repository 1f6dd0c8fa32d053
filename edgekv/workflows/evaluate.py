"""Evaluation: the loss of a model and its cache, measured on texts and tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekv.backends.open import Kind, default_kind
from edgekv.cache.policies.names import DEFAULT_POLICY, LayerBudgets
from edgekv.cache.policies.settings import SLICE, wanted_eviction
from edgekv.evaluate.journal import default_folder
from edgekv.evaluate.model_under_test import ModelUnderTest, Weights
from edgekv.evaluate.report import EvalReport
from edgekv.evaluate.run import Evaluation, Measurements
from edgekv.evaluate.workers import Run
from edgekv.progress import Stages, ignore, silent
from edgekv.workflows.request import Request, as_paths

__all__ = ["Effort", "EvaluateRequest", "Measurements", "evaluate_model"]


@dataclass(frozen=True)
class Effort(Request):
    """How measurements are carried out; nothing here changes their figures.

    Attributes:
        threads: total of all jobs; by default the big physical cores.
        jobs: processes that share them; by default one per core, as memory allows.
        cache_dir: keeps journals, references and copies of weights; by default the user's cache folder.
        fresh: ignore the results of earlier runs.
    """

    threads: int | None = None
    jobs: int | None = None
    cache_dir: Path | None = None
    fresh: bool = False

    def run(self) -> Run:
        """The settings that edgekv.evaluate works with."""
        return Run(self.cache_dir or default_folder(), ignore, self.jobs, self.threads, self.fresh)


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """What to measure of a model.

    Attributes:
        measurements: texts and tasks.
        against: the reference model: adds KL, argmax agreement and changes.
        cache_type: such as "q8_0", or "q8_0/q4_0" for K and V; by default the engine's.
        backend: by default the one that reads the model's format.
        against_backend: by default the NumPy reference, for ONNX folders onnx; llama.cpp runs it with an f32 cache.
        weights: "keep", or a format to dequantize the weights to first, so that only the cache's loss is left.
        budget, policy: rows that the model's cache keeps, never the reference's, and which; by default all stay.
        layers: how the budget is spread over layers, in engines where they may differ.
        slice_size: tokens of a prompt between two evictions.
        command: recorded in the report as the command that made it.
    """

    model: Path
    measurements: Measurements
    against: Path | None = None
    cache_type: str | None = None
    backend: Kind | None = None
    against_backend: Kind | None = None
    weights: Weights = "keep"
    budget: int | None = None
    policy: str = DEFAULT_POLICY
    layers: LayerBudgets = "uniform"
    slice_size: int = SLICE
    effort: Effort = field(default_factory=Effort)
    command: str = "edgekv.evaluate_model"

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.measurements
        texts = {
            name: as_paths(getattr(wanted, name)) for name in ("text", "positions", "retrieval", "ruler")
        }
        tasks = tuple((name, Path(file)) for name, file in wanted.tasks)
        object.__setattr__(self, "measurements", replace(wanted, tasks=tasks, **texts))


def evaluate_model(
    request: EvaluateRequest, progress: Stages = silent, say: Callable[[str], None] = lambda line: None
) -> EvalReport:
    """Measure perplexity, KL (nats per token), task accuracy, loss by position, retrieval and RULER's tasks.

        wanted = edgekv.Measurements(text, window=128, limit=2)
        request = edgekv.EvaluateRequest(small, wanted, against=model, cache_type="q4_0", weights="f32")
        print(edgekv.evaluate_model(request).windows.kl)

    Args:
        say: called with lines for people, as soon as they are known.

    Raises:
        InputError: nothing is asked for, or an input cannot be used.
        BackendError: an engine is not installed, failed, or its process died; finished results are kept.
    """
    model = request.model
    measured = ModelUnderTest(
        model,
        request.backend or default_kind(model),
        request.cache_type,
        request.weights,
        wanted_eviction(request.budget, request.policy, request.layers, request.slice_size),
    )
    reference = _reference(request, request.against) if request.against else None
    evaluation = Evaluation(measured, reference, request.effort.run(), progress, say)
    return evaluation.run(request.measurements, request.command)


def _reference(request: EvaluateRequest, path: Path) -> ModelUnderTest:
    """The reference: in float32 in NumPy, or in llama.cpp with an f32 cache and the weights of the request."""
    backend = request.against_backend
    if backend is None:
        backend = "onnx" if default_kind(path) == "onnx" else "reference"
    if backend == "llama.cpp":
        return ModelUnderTest(path, backend, "f32", request.weights)
    return ModelUnderTest(path, backend)
