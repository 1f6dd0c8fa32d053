"""What `edgekv eval` found, as one versioned JSON document and as lines of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekv import __version__
from edgekv.evaluate.subject import Subject, cache_nbytes_per_token, engine_version, file_sha256
from edgekv.evaluate.windows import WindowsResult

FORMAT: Literal["edgekv.eval"] = "edgekv.eval"
VERSION = 1


@dataclass(frozen=True)
class Measured:
    """A model as it was run."""

    file: str
    sha256: str
    backend: str
    engine: str  # version
    weights: str  # "stored", or the type they were dequantized to
    cache_type: str
    cache_nbytes_per_token: float  # as the engine allocated it, all layers

    @classmethod
    def of(cls, subject: Subject) -> Measured:
        """Describe a subject; opens it once."""
        return cls(
            file=subject.path.name,
            sha256=file_sha256(subject.path),
            backend=subject.backend,
            engine=engine_version(subject.backend),
            weights=subject.weights,
            cache_type=subject.cache,
            cache_nbytes_per_token=cache_nbytes_per_token(subject),
        )


@dataclass(frozen=True)
class EvalReport:
    """Everything measured of one model in one run; what was not asked for is None or empty."""

    format: Literal["edgekv.eval"]
    version: int
    edgekv: str
    command: str
    model: Measured
    reference: Measured | None
    windows: WindowsResult | None


def make_report(
    command: str, model: Measured, reference: Measured | None, windows: WindowsResult | None
) -> EvalReport:
    """A report of this version."""
    return EvalReport(FORMAT, VERSION, __version__, command, model, reference, windows)


def windows_lines(result: WindowsResult) -> list[str]:
    """The windows' figures for people."""
    head = (
        f"{result.text}: {result.windows} windows of {result.window}, {result.tokens_scored:,} tokens scored"
    )
    if result.kl is None:
        return [head, f"  perplexity  {result.ppl:.4f}"]
    return [
        head,
        f"  perplexity  {result.ppl:.4f}, reference {result.reference_ppl:.4f}, ratio x{result.ppl_ratio:.4f} "
        f"± {result.ppl_ratio_se:.4f}",
        f"  KL          {result.kl:.6f} ± {result.kl_se:.6f} nats a token",
        f"  argmax      {result.argmax_agreement:.2%} agree",
    ]
