"""`edgekv heal`: distillation of the original into its converted self."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import options
from edgekv.cli.common.progress import ProgressLine, clock, stages

if TYPE_CHECKING:
    from edgekv.heal.job import Event

# Names of the events in --json, which stay when a class is renamed.
EVENT_NAMES = {
    "Stage": "stage",
    "LayerLoss": "layerloss",
    "TrainingStep": "progress",
    "Evaluation": "evaluation",
}


@options.command("heal")
@options.model()
@options.output("File of healed weights (.safetensors).")
@options.latent_size(rope_default="half the head dim")
@options.text("Training text: .txt, .txt.xz, or tokens in .npy.", multiple=True)
@click.option("--self", "self_tokens", type=int, metavar="N",
              help="Let the original write N tokens to train on.")  # fmt: skip
@click.option("--eval-text", type=options.PATH, metavar="FILE",
              help="Held-out text to score on.  [default: the last of --text]")  # fmt: skip
@click.option("--eval-windows", default=64, show_default=True, help="Windows of that text to score.")
@click.option("--steps", type=int, help="Steps of training; 0 writes the unhealed conversion.")
@click.option("--minutes", type=float, help="Train this long; with --steps: stop then, for --resume.")
@click.option("--resume", is_flag=True, help="Go on where a training that was stopped or killed left off.")
@click.option("--start", type=options.PATH, help="Begin from the weights of this file of healed weights.")
@options.cache_type("Cache type to train for.", ("f16", "q8_0", "q5_0", "q4_0"), "f16")
@click.option("--lr", default=2e-3, show_default=True,
              help="Peak learning rate (Muon); a quarter for a start 0.1 nats from the original.")  # fmt: skip
@click.option("--match-share", default=0.05, show_default=True,
              help="Share of the steps that match attention outputs, before the KL.")  # fmt: skip
@click.option("--batch-tokens", default=32768, show_default=True, help="Tokens per step.")
@click.option("--seq-len", default=1024, show_default=True, help="Tokens per sequence.")
@click.option("--short-len", type=click.IntRange(min=2),
              help="On every second step, train on pieces of this many tokens.")  # fmt: skip
@options.seed("Seed of the order of the text, and of what --self writes.")
@click.option("--store", default="q8_0", show_default=True, type=click.Choice(["q6_k", "q8_0", "bf16"]),
              help="How the healed weights are stored.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cuda", "cpu"]),
              help="Where to train.")  # fmt: skip
@options.force("Replace the output and forget a stopped training.")
@options.as_json("Print one JSON object per line.")
def command(output: Path, steps: int | None, as_json: bool, **wanted: Any) -> None:
    """Distil a model into its converted self, so that the small cache costs less.

    The original is the teacher, the training-free conversion the student. First each layer learns to give
    the original's attention output on the original's inputs, then all together learn its next-token
    distribution. Only attention and norms are trained: the output is a small file; `edgekv convert --healed` builds
    the GGUF from it and the original. What is left of the loss is printed at the end. Needs PyTorch: pip install
    'edgekv[heal]'.

    \b
    edgekv heal model.gguf -o healed.safetensors --target 0.334 --text corpus.txt.xz --minutes 10
    edgekv heal model.gguf -o healed.safetensors --target 0.334 --self 20000000 --steps 1000
    edgekv heal ... --resume                      after a stop, a crash or kill -9
    edgekv convert model.gguf -o small.gguf --healed healed.safetensors

    \b
    Memory on a GPU: 2 bytes per weight, 16 per trained weight, 1.6 GB for logits, and activations, for which
    batches are split as needed. Llama-3.2-1B on a 24 GB card: 2.5 + 2.7 + 1.6 GB, and 11 GB for 8192 tokens.
    """
    from edgekv.workflows.heal import MAX_STEPS, HealRecipe, HealRequest, encode, heal_model

    wanted["steps"] = MAX_STEPS if steps is None else steps
    recipe = options.build(HealRecipe, wanted)

    def emit(event: Event) -> None:
        click.echo(json.dumps({"event": EVENT_NAMES[type(event).__name__], **encode(event)}))

    request = HealRequest(output=output, recipe=recipe, **wanted)
    record = heal_model(request, emit if as_json else Shown(), stages(quiet=False))
    if as_json:
        click.echo(json.dumps({"event": "written", "path": str(output), "record": encode(record)}))
        return
    last = record.evaluations[-1]
    click.echo(
        f"{output}: KL {last.kl:.4f}, perplexity {last.ppl:.3f} (x{last.ppl / last.teacher_ppl:.3f}) over "
        f"{last.tokens_scored} tokens, as stored"
    )
    if record.steps_done < record.recipe.steps:
        click.echo(
            f"stopped at step {record.steps_done} of {record.recipe.steps}; go on with the same command and --resume"
        )


class Shown:
    """The events of a training, for people, on stderr."""

    def __init__(self) -> None:
        self._training = ProgressLine("step")

    def __call__(self, event: Event) -> None:
        from edgekv.workflows.heal import Evaluation, LayerLoss, Stage

        if isinstance(event, Stage):
            click.echo(f"{event.text} ...", err=True)
        elif isinstance(event, LayerLoss):
            click.echo(f"converted layer {event.layer}: output error {event.output_error:.3f}", err=True)
        elif isinstance(event, Evaluation):
            click.echo(
                f"step {event.step}: KL {event.kl:.4f}  perplexity {event.ppl:.3f} "
                f"(x{event.ppl / event.teacher_ppl:.3f})  argmax {event.argmax_agreement:.2%}",
                err=True,
            )
        else:
            self._training(
                event.step,
                event.steps + 1,  # it ends with an evaluation, not with its last step
                f"phase {event.phase}  loss {event.loss:.4f}  lr {event.lr:.2e}  "
                f"{event.tokens_per_s:,.0f} tokens/s  {clock(event.eta_s)} left",
            )
