"""`edgekv heal`: distil the original into its converted self."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgekv.heal.job import Event, HealJob
    from edgekv.heal.recipe import HealRecipe
    from edgekv.heal.training import TrainingStep
    from edgekv.progress import Progress
    from edgekv.source import TensorSource
    from edgekv.text.shards import Shard
    from edgekv.tokenizer.tokenizer import Tokenizer

FILE = click.Path(path_type=Path)
# Names of the events in --json, whatever the classes are called.
EVENT_NAMES = {
    "Stage": "stage",
    "LayerLoss": "layerloss",
    "TrainingStep": "progress",
    "Evaluation": "evaluation",
}


@click.command("heal")
@click.argument("model", type=FILE)
@click.option("-o", "--output", required=True, type=FILE, help="File of healed weights (.safetensors).")
@click.option("--target", type=float, help="Share of the cache bytes to keep, as in `edgekv convert`.")
@click.option("--kv-lora-rank", type=int, help="Width of the latent.")
@click.option("--rope-dim", type=int, help="Width of the shared rope key.  [default: half the head dim]")
@click.option("--nope-dim", type=int, help="Query dims a head that read the latent.  [default: 32]")
@click.option("--text", multiple=True, type=FILE, help="Training text: .txt, .txt.xz, or tokens in .npy.")
@click.option("--self", "self_tokens", type=int, help="Let the original write this many tokens to train on.")
@click.option(
    "--eval", "eval_text", type=FILE, help="Held-out text to score on.  [default: the last of --text]"
)
@click.option("--eval-windows", default=64, show_default=True, help="Windows of it to score.")
@click.option("--steps", type=int, help="Steps of training; 0 writes the unhealed conversion.")
@click.option("--minutes", type=float, help="Train so long; with --steps: stop then, for --resume.")
@click.option("--resume", is_flag=True, help="Go on where a training that was stopped or killed left off.")
@click.option("--start", type=FILE, help="Begin from the weights of this file of healed weights.")
@click.option("--cache", default="f16", show_default=True, type=click.Choice(["f16", "q8_0", "q5_0", "q4_0"]),
              help="Cache type to train for.")  # fmt: skip
@click.option("--train", default="attn+norms", show_default=True, type=click.Choice(["attn", "attn+norms", "all"]),
              help="Weights to train; feed-forwards (all) make the file several times larger.")  # fmt: skip
@click.option("--lr", default=2e-3, show_default=True,
              help="Peak learning rate; a quarter for a start 0.1 nats from the original. "
              "AdamW wants a fifth.")  # fmt: skip
@click.option("--match-share", default=0.05, show_default=True, help="Share of the steps for phase 1.")
@click.option("--schedule", default="cosine", show_default=True, type=click.Choice(["cosine", "wsd"]),
              help="How the learning rate falls.")  # fmt: skip
@click.option("--optimizer", default="muon", show_default=True, type=click.Choice(["adamw", "muon"]),
              help="Optimizer of the attention matrices.")  # fmt: skip
@click.option("--batch-tokens", default=32768, show_default=True, help="Tokens a step.")
@click.option("--seq-len", default=1024, show_default=True, help="Tokens a sequence.")
@click.option("--short-len", type=click.IntRange(min=2),
              help="Every other step cuts its sequences into pieces of so many tokens.")  # fmt: skip
@click.option("--seed", default=0, type=click.IntRange(min=0), show_default=True,
              help="Order of the text, and what --self writes.")  # fmt: skip
@click.option("--store", default="q8_0", show_default=True, type=click.Choice(["q6_k", "q8_0", "bf16"]),
              help="How the healed weights are stored.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cuda", "cpu"]),
              help="Where to train.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output and forget a stopped training.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def command(as_json: bool, **options: Any) -> None:
    """Distil a model into its converted self until the small cache costs next to nothing.

    The original is the teacher, the training-free conversion the student. First each layer learns to give
    the original's attention output on the original's inputs, then all together learn its next-token
    distribution. Only attention and norms are trained: the outcome is a small file; `edgekv convert --healed` builds
    the GGUF from it and the original. Needs PyTorch: pip install 'edgekv[heal]'.

    \b
    edgekv heal model.gguf -o healed.safetensors --target 0.334 --text corpus.txt.xz --minutes 10
    edgekv heal model.gguf -o healed.safetensors --target 0.334 --self 20000000 --steps 1000
    edgekv heal ... --resume                      after a stop, a crash or kill -9
    edgekv convert model.gguf -o small.gguf --healed healed.safetensors

    \b
    Memory on a GPU: 2 bytes a weight, 16 a trained weight, 1.6 GB for logits, and activations, for which
    batches are split as needed. Llama-3.2-1B on a 24 GB card: 2.5 + 2.7 + 1.6 GB, and 11 GB for 8192 tokens.
    """
    from edgekv.heal.job import heal

    job = _job(**options)
    record = heal(job, _print_json if as_json else _show)
    if as_json:
        from edgekv.documents import encode

        _emit({"event": "written", "path": str(job.out), "record": encode(record)})
        return
    last = record.evaluations[-1]
    stopped = record.steps_done < record.recipe.steps
    click.echo(
        f"{job.out}: KL {last.kl:.4f}, perplexity {last.ppl:.3f} (x{last.ppl / last.teacher_ppl:.3f}) over "
        f"{last.tokens_scored} tokens, as stored"
    )
    if stopped:
        click.echo(
            f"stopped at step {record.steps_done} of {record.recipe.steps}; go on with the same command and --resume"
        )


def _job(
    model: Path,
    output: Path,
    target: float | None,
    kv_lora_rank: int | None,
    rope_dim: int | None,
    nope_dim: int | None,
    text: tuple[Path, ...],
    self_tokens: int | None,
    eval_text: Path | None,
    eval_windows: int,
    steps: int | None,
    minutes: float | None,
    resume: bool,
    start: Path | None,
    store: Any,
    device: str,
    force: bool,
    **recipe: Any,
) -> HealJob:
    """Check what was asked for and read the texts."""
    from edgekv.convert.layers import convertible_attention
    from edgekv.convert.target import resolve_target
    from edgekv.errors import InputError
    from edgekv.heal.job import MAX_STEPS, HealJob
    from edgekv.heal.recipe import HealRecipe
    from edgekv.models.open import open_source
    from edgekv.text.shards import load_shard
    from edgekv.tokenizer.tokenizer import Tokenizer

    if steps is None and minutes is None:
        raise InputError("say how long to train: --steps or --minutes")
    if not text and not self_tokens:
        raise InputError("training needs text: --text FILE, or --self TOKENS to let the original write it")
    if any(number is not None and number <= 0 for number in (minutes, self_tokens, eval_windows)) or (
        steps is not None and steps < 0
    ):
        raise InputError("--steps, --minutes, --self and --eval-windows take positive numbers")
    source = open_source(model)
    gqa = convertible_attention(source.spec)
    attention = resolve_target(gqa, target, kv_lora_rank, rope_dim, nope_dim, healed=True)
    cache = recipe.pop("cache")
    made = HealRecipe(steps=MAX_STEPS if steps is None else steps, cache_type=cache, **recipe)
    tokenizer = Tokenizer.from_metadata(source.metadata)
    encode = tokenizer.encode
    shards = [load_shard(path, source, encode, _tokenizing(path)) for path in text]
    if self_tokens:
        shards.append(_written(source, tokenizer, self_tokens, made, device))
    return HealJob(
        source=source,
        attention=attention,
        recipe=made,
        shards=tuple(shards),
        evaluation=load_shard(eval_text, source, encode, _tokenizing(eval_text)) if eval_text else None,
        windows=eval_windows,
        out=output,
        storage=store,
        minutes=minutes,
        start=start,
        resume=resume,
        force=force,
        device=device,
    )


def _written(source: TensorSource, tokenizer: Tokenizer, n: int, recipe: HealRecipe, device: str) -> Shard:
    """Text of `n` tokens that the model writes, half of it chats if it has a template."""
    from edgekv.chat.session import PromptFormat
    from edgekv.heal.job import self_written
    from edgekv.text.chats import Chat

    def progress(done: int, total: int, figures: str = "", /) -> None:
        _status(f"writing text: {done} of {total} sequences")

    form = PromptFormat.of_model(tokenizer)
    chat = None
    if form.has_template:
        chat = Chat(lambda question: form.tokens("", (), question), tokenizer.stop_ids, recipe.seed)
    return self_written(source, tokenizer, chat, n, recipe, device, progress)


def _tokenizing(path: Path) -> Progress:
    """Progress over a text whose length is not known: every ten million characters."""
    said = 0

    def progress(done: int, total: int, figures: str = "", /) -> None:
        nonlocal said
        if done // 10_000_000 > said:
            said = done // 10_000_000
            _status(f"tokenizing {path.name}: {said}0 million characters")

    return progress


def _status(line: str) -> None:
    """One line on stderr, rewritten in place on a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{line}", nl=False, err=True)
    else:
        click.echo(line, err=True)


def _show(event: Event | TrainingStep) -> None:
    """An event for people, on stderr."""
    from edgekv.convert.layers import LayerLoss
    from edgekv.heal.job import Stage
    from edgekv.heal.recipe import Evaluation

    end = "\n" if sys.stderr.isatty() else ""
    if isinstance(event, Stage):
        _status(f"{event.text} ...{end}")
    elif isinstance(event, LayerLoss):
        _status(f"converted layer {event.layer}: output error {event.output_error:.3f}")
    elif isinstance(event, Evaluation):
        _status(
            f"step {event.step}: KL {event.kl:.4f}  perplexity {event.ppl:.3f} "
            f"(x{event.ppl / event.teacher_ppl:.3f})  argmax {event.argmax_agreement:.2%}{end}"
        )
    else:
        _status(
            f"step {event.step}/{event.steps}  phase {event.phase}  loss {event.loss:.4f}  "
            f"lr {event.lr:.2e}  {event.tokens_per_s:,.0f} tokens/s  {_duration(event.eta_s)} left"
        )


def _duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60}:{minutes % 60:02}:{int(seconds) % 60:02}"


def _emit(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document))


def _print_json(event: Event | TrainingStep) -> None:
    """An event for machines, on stdout."""
    from edgekv.documents import encode

    _emit({"event": EVENT_NAMES[type(event).__name__], **encode(event)})
