"""Healing: distillation of an original model into its converted self, as a file of healed weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgekv.chat.session import PromptFormat
from edgekv.convert.layers import LayerLoss, convertible_attention
from edgekv.convert.target import resolve_target
from edgekv.documents import encode
from edgekv.errors import InputError, OutputError
from edgekv.heal.job import MAX_STEPS, HealJob, Report, Stage, heal, self_written
from edgekv.heal.recipe import Evaluation, HealedRecord, HealRecipe
from edgekv.heal.weights import Storage
from edgekv.models.open import open_model
from edgekv.progress import Stages, silent
from edgekv.source import TensorSource
from edgekv.text.chats import Chat
from edgekv.text.shards import Shard, load_shard
from edgekv.tokenizer.tokenizer import Tokenizer
from edgekv.workflows.request import Request

__all__ = [
    "MAX_STEPS",
    "Evaluation",
    "HealRecipe",
    "HealRequest",
    "HealedRecord",
    "LayerLoss",
    "Stage",
    "encode",
    "heal_model",
]


@dataclass(frozen=True)
class HealRequest(Request):
    """What to heal, on what, for how long.

    Give `target` (the share of the cache's bytes to keep) or `kv_lora_rank`; `recipe.steps`, `minutes` or both;
    and `text`, `self_tokens` or both.

    Attributes:
        model: the original, a GGUF file or a Hugging Face folder.
        output: the file of healed weights to write (.safetensors).
        rope_dim: width of the shared rope key (qk_rope_head_dim); by default half the head dim.
        nope_dim: query dims per head that read the latent (qk_nope_head_dim).
        text: training text: .txt, .txt.xz, or tokens in .npy.
        self_tokens: train on this many tokens that the original writes.
        eval_text: held-out text to score on; by default the last of the training text.
        eval_windows: windows of the evaluation text to score.
        recipe: steps, learning rate, batch, cache type to train for, seed.
        minutes: alone: train this long; with `recipe.steps`: stop then, for `resume`.
        resume: go on where a training that was stopped or killed left off.
        start: a file of healed weights to begin from.
        store: how the healed weights are stored.
        device: "auto", "cuda" or "cpu".
    """

    model: Path
    output: Path
    target: float | None = None
    kv_lora_rank: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None
    text: tuple[Path, ...] = ()
    self_tokens: int | None = None
    eval_text: Path | None = None
    eval_windows: int = 64
    recipe: HealRecipe = field(default_factory=lambda: HealRecipe(steps=MAX_STEPS))
    minutes: float | None = None
    resume: bool = False
    start: Path | None = None
    store: Storage = "q8_0"
    device: str = "auto"
    force: bool = False


def heal_model(request: HealRequest, report: Report, progress: Stages = silent) -> HealedRecord:
    """Train the attention and norms of a converted model to predict what the original does.

        from edgekv.workflows.heal import HealRecipe

        recipe = HealRecipe(steps=1, batch_tokens=512, seq_len=128, cache_type="q4_0")
        request = edgekv.HealRequest(model, output, target=0.5, text=(text,), recipe=recipe)
        print(edgekv.heal_model(request, print).evaluations[-1].kl)

    Args:
        report: called with stages, converted layers, training steps and evaluations as they happen.
        progress: of reading and writing text, before the training.

    Returns:
        The record of what was written; `steps_done` is less than `recipe.steps` if it was stopped before its end.

    Raises:
        InputError: an option is impossible, PyTorch is missing, a text cannot be read, inputs do not fit each other.
        UnsupportedError: the model cannot become MLA.
        OutputError: the output exists, or cannot be written.
        EdgeKVError: the training diverged.
    """
    return heal(_job(request, progress), report)


def _job(request: HealRequest, progress: Stages) -> HealJob:
    """Check the request and read its texts."""
    _check(request)
    source = open_model(request.model)
    gqa = convertible_attention(source.spec)
    sizes = (request.target, request.kv_lora_rank, request.rope_dim, request.nope_dim)
    attention = resolve_target(gqa, *sizes, healed=True)
    tokenizer = Tokenizer.from_metadata(source.metadata)

    def shard(path: Path, option: str) -> Shard:
        return load_shard(
            path, source, tokenizer.encode, progress(f"tokenizing {path.name}, characters"), option
        )

    shards = [shard(path, "--text") for path in request.text]
    if request.self_tokens:
        shards.append(_written(source, tokenizer, request.self_tokens, tuple(shards), request, progress))
    return HealJob(
        source=source,
        attention=attention,
        recipe=request.recipe,
        shards=tuple(shards),
        evaluation=shard(request.eval_text, "--eval-text") if request.eval_text else None,
        windows=request.eval_windows,
        out=request.output,
        storage=request.store,
        minutes=request.minutes,
        start=request.start,
        resume=request.resume,
        force=request.force,
        device=request.device,
    )


def _check(request: HealRequest) -> None:
    if request.recipe.steps == MAX_STEPS and request.minutes is None:
        raise InputError("say how long to train: --steps or --minutes")
    if not request.text and not request.self_tokens:
        raise InputError("training needs text: --text FILE, or --self TOKENS to let the original write it")
    if request.output.exists() and not (request.force or request.resume):
        raise OutputError(f"{request.output} exists; pass --resume to go on from it or --force to start anew")
    positive = (request.minutes, request.self_tokens, request.eval_windows)
    if any(number is not None and number <= 0 for number in positive) or request.recipe.steps < 0:
        raise InputError("--steps, --minutes, --self and --eval-windows take positive numbers")


def _written(
    source: TensorSource,
    tokenizer: Tokenizer,
    n_tokens: int,
    texts: tuple[Shard, ...],
    request: HealRequest,
    progress: Stages,
) -> Shard:
    """Text that the model writes, part of it chats if it has a template, the rest going on from `texts`."""
    form = PromptFormat.of_model(tokenizer, str(request.model), "give a text with --text instead of --self")
    chat = None
    if form.has_template:
        seed = request.recipe.seed
        chat = Chat(lambda question: form.tokens("", (), question), tokenizer.stop_ids, seed)
    writing = progress("writing text, tokens")
    return self_written(source, tokenizer, chat, n_tokens, texts, request.recipe, request.device, writing)
