"""Healing job: from a model file and texts to a file of healed weights. PyTorch is imported when a job runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgekv import __version__
from edgekv.convert.layers import LayerLoss, convert
from edgekv.convert.statistics import FitRecipe
from edgekv.errors import InputError, OutputError
from edgekv.files import temporary_folder
from edgekv.heal.recipe import DataRecord, Evaluation, HealedRecord, HealRecipe, TrainingStep
from edgekv.heal.weights import (
    FORMAT,
    Storage,
    base_sha256,
    check_base,
    read_healed,
    student_shapes,
    student_tensors,
)
from edgekv.progress import Progress, ignore
from edgekv.rewrite.balance import balanced
from edgekv.source import Array, TensorSource
from edgekv.spec import MLA
from edgekv.text.chats import Chat
from edgekv.text.shards import Shard, TokenStream, cache_folder, load_shard, write_tokens
from edgekv.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

CALIBRATION_TOKENS = 16384  # for a start: phase 1 fits the same layers on the same kind of text, much further
HELD_OUT = 32  # sequences kept for evaluation when no text is given for it
MAX_STEPS = 10**9  # placeholder: as many steps as fit in `minutes`
WRITTEN_LEN = 1024  # tokens of a sequence that the teacher writes: longer ones would be few at once, and slow
CHAT_EVERY, CHAT_EVERY_WITH_TEXT = 2, 4  # one of so many sequences that the teacher writes is a chat
SHAPE = ("n_heads", "kv_lora_rank", "rope_dim", "nope_dim", "value_dim", "rope_theta")


@dataclass(frozen=True)
class HealJob:
    """Model, recipe and texts of a healing, and the file to write.

    With `minutes` and `recipe.steps` = MAX_STEPS the number of steps is measured to fit; with both given,
    training stops after `minutes` and `resume` takes it up.
    """

    source: TensorSource
    attention: MLA
    recipe: HealRecipe
    shards: tuple[Shard, ...]
    out: Path
    evaluation: Shard | None = None  # text to score on; None: the last HELD_OUT sequences of the last shard
    windows: int = 64  # evaluation windows at most
    storage: Storage = "q8_0"
    minutes: float | None = None
    start: Path | None = None  # healed weights to begin with, in place of a fresh conversion
    resume: bool = False
    force: bool = False
    device: str = "auto"  # or "cuda", "cpu"

    @property
    def state_path(self) -> Path:
        """The full training state, beside the output."""
        return self.out.with_name(self.out.name + ".state")


@dataclass(frozen=True)
class Stage:
    """The start of a step of the work, as text for the terminal."""

    text: str


Event = Stage | LayerLoss | Evaluation | TrainingStep
Report = Callable[[Event], None]


def heal(job: HealJob, report: Report) -> HealedRecord:
    """Run a job; the record of what was written. `steps_done < recipe.steps` if it was stopped before its end.

    Raises:
        InputError: PyTorch is missing, or inputs do not fit each other.
        OutputError: the output exists, or cannot be written.
        EdgeKVError: the training diverged.
    """
    device = pick_device(job.device)
    _check(job)
    stream, windows = _text(job)  # refuses too little text before minutes go into a conversion
    record, tensors = _begin(job, device, report)
    report(Stage("loading teacher and student"))
    from edgekv.heal.training import Healer

    healer = Healer(job.source, tensors, record, stream, windows, device, report)
    if job.resume and job.state_path.exists():
        healer.restore(job.state_path)
        _check_same(record, healer.record)
    elif record.recipe.steps == MAX_STEPS:
        assert job.minutes is not None
        report(Stage("measuring a step"))
        steps = _steps_in(job.minutes * 60, job.recipe, *healer.measure())
        healer.record = replace(record, recipe=replace(job.recipe, steps=steps))
    deadline = job.minutes * 60 if job.minutes is not None and job.recipe.steps != MAX_STEPS else None
    finished = healer.run(job.state_path, deadline)
    healer.write(job.out, job.storage if finished else "bf16")
    if finished:
        job.state_path.unlink(missing_ok=True)
    return healer.record


def _check(job: HealJob) -> None:
    """Raise InputError unless the recipe fits the attention."""
    rank, rope_dim, recipe = job.attention.kv_lora_rank, job.attention.rope.dim, job.recipe
    if recipe.cache_type != "f16" and (rank % 32 or rope_dim % 32):
        raise InputError(
            f"--cache-type {recipe.cache_type} stores blocks of 32 values: rank {rank} and rope key {rope_dim} "
            "both have to be multiples of 32"
        )
    if recipe.short_len is not None and recipe.seq_len % recipe.short_len:
        raise InputError(
            f"--short-len {recipe.short_len} does not divide --seq-len {recipe.seq_len}; take a half, a quarter, ..."
        )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA where there is one.

    Raises:
        InputError: PyTorch or the device is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError("healing needs PyTorch; install it: pip install 'edgekv[heal]'") from error
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: PyTorch finds no CUDA GPU here; use --device cpu, or check the driver"
        )
    return torch.device(name)


def _begin(job: HealJob, device: torch.device, report: Report) -> tuple[HealedRecord, dict[str, Array]]:
    """The record and the student's tensors to go on from: an earlier file's, or a fresh conversion's."""
    record = _fresh_record(job, device)
    if job.resume:
        return _resumed(job, record, report)
    for path in (job.out, job.state_path):
        if path.exists() and not job.force:
            raise OutputError(f"{path} exists; pass --resume to go on from it or --force to start anew")
    if job.start is None:
        return record, _convert(job, report)
    before, tensors = read_healed(job.start)
    check_base(job.start, before, job.source)
    if changes := _changes(_shape(before), _shape(record)):
        raise InputError(f"{job.start} has attention of another shape ({changes}); ask for the same sizes")
    return replace(record, earlier=before if before.steps_done else None), tensors


def _resumed(job: HealJob, record: HealedRecord, report: Report) -> tuple[HealedRecord, dict[str, Array]]:
    """Record and tensors of a training that was stopped or killed."""
    if job.state_path.exists():  # its tensors replace these
        report(Stage(f"going on from {job.state_path}"))
        shapes = student_shapes(job.attention, job.source.spec.n_layers, job.source.spec.dim)
        return record, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if not job.out.exists():
        raise InputError(
            f"nothing to resume: neither {job.state_path} nor {job.out} exists; leave out --resume"
        )
    before, tensors = read_healed(job.out)
    _check_same(record, before)
    report(Stage(f"going on from {job.out}, step {before.steps_done}; the optimizer starts afresh"))
    return before, tensors


def _convert(job: HealJob, report: Report) -> dict[str, Array]:
    """The training-free conversion, calibrated on the first of the training text."""
    report(Stage("converting"))
    length = job.recipe.seq_len
    rows = [shard.tokens[: len(shard.tokens) // length * length].reshape(-1, length) for shard in job.shards]
    each = -(-CALIBRATION_TOKENS // length // len(rows))
    windows = np.concatenate([row[:each] for row in rows]).astype(np.int64)
    with temporary_folder("edgekv-heal-") as folder:
        converted = convert(job.source, job.attention, windows, folder, FitRecipe(), report)
        return balanced(student_tensors(converted), job.attention)


def _text(job: HealJob) -> tuple[TokenStream, NDArray[np.int64]]:
    """The training stream and the windows to evaluate on."""
    recipe = job.recipe
    held_out = 0 if job.evaluation else min(HELD_OUT, job.windows)
    stream = TokenStream(job.shards, recipe.seq_len, recipe.batch_sequences, recipe.seed, held_out)
    if job.evaluation is None:
        return stream, stream.held_out
    tokens = job.evaluation.tokens
    count = min(job.windows, len(tokens) // recipe.seq_len)
    if count == 0:
        raise InputError(
            f"{job.evaluation.name} is shorter than one window of {recipe.seq_len} tokens; "
            "give a longer text to evaluate on, or a smaller --seq-len"
        )
    return stream, tokens[: count * recipe.seq_len].reshape(count, -1).astype(np.int64)


def _fresh_record(job: HealJob, device: torch.device) -> HealedRecord:
    import torch

    a = job.attention
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return HealedRecord(
        format=FORMAT,
        base_name=job.source.spec.name,
        base_sha256=base_sha256(job.source),
        n_heads=a.n_heads,
        kv_lora_rank=a.kv_lora_rank,
        rope_dim=a.rope.dim,
        nope_dim=a.nope_dim,
        value_dim=a.value_dim,
        rope_theta=a.rope.theta,
        recipe=job.recipe,
        steps_done=0,
        data=tuple(DataRecord(shard.name, shard.sha256, len(shard.tokens)) for shard in job.shards),
        evaluation_text=job.evaluation.name if job.evaluation else f"the last {HELD_OUT} training sequences",
        evaluations=(),
        curve=(),
        made_with=f"edgekv {__version__}, torch {torch.__version__}, {place}",
    )


def _shape(record: HealedRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in SHAPE}


def _check_same(wanted: HealedRecord, found: HealedRecord) -> None:
    """Raise InputError unless a stopped training is the one that the job describes."""
    recipe = wanted.recipe
    if recipe.steps == MAX_STEPS:
        recipe = replace(recipe, steps=found.recipe.steps)
    texts = (
        {f"text {i}": f"{data.name} ({data.sha256[:16]}…)" for i, data in enumerate(record.data, start=1)}
        for record in (found, wanted)
    )
    for what, changes in {
        "the original model": _changes({"SHA-256": found.base_sha256}, {"SHA-256": wanted.base_sha256}),
        "the shape of the attention": _changes(_shape(found), _shape(wanted)),
        "the training text": _changes(*texts),
        "the recipe": _changes(asdict(found.recipe), asdict(recipe)),
    }.items():
        if changes:
            raise InputError(
                f"--resume: {what} differs from the stopped training's ({changes}); "
                "give the same options, or --force to start anew"
            )


def _changes(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """What differs, for people: "steps 200, now 300"."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)}, now {new.get(name)}" for name in names)


def _steps_in(seconds: float, recipe: HealRecipe, first_s: float, second_s: float) -> int:
    """Steps that fit, from the measured seconds per step in each phase; 5 % is left for evaluations."""
    mean_s = recipe.match_share * first_s + (1 - recipe.match_share) * second_s
    return max(1, int(0.95 * seconds / mean_s))


def self_written(
    source: TensorSource,
    tokenizer: Tokenizer,
    chat: Chat | None,
    n_tokens: int,
    texts: Sequence[Shard],
    recipe: HealRecipe,
    device: str,
    progress: Progress,
) -> Shard:
    """Text that the teacher writes, kept in the cache folder: the same call gives the same file.

    Args:
        chat: chats in the model's own template, drawn with the recipe's seed.
        texts: what plain sequences go on from; without any they begin with a random token.
        progress: counts tokens.

    Raises:
        InputError: PyTorch or the device is missing.
    """
    place = pick_device(device)
    length = min(recipe.seq_len, WRITTEN_LEN)
    n_sequences = -(-n_tokens // length)
    begun = "".join(f"-{shard.sha256[:8]}" for shard in texts)
    key = f"{base_sha256(source)[:16]}-{place.type}-{n_sequences}x{length}-{recipe.seed}{begun}"
    path = cache_folder() / f"self-{key}.npy"
    if not path.exists():
        from edgekv.heal.teacher_text import OPENING_TOKENS, opening, write_text

        rng = np.random.default_rng(recipe.seed)

        def openings() -> Iterator[list[int]]:
            while texts:
                yield opening(texts, OPENING_TOKENS, rng)
            words = [i for i in range(source.spec.vocab) if not tokenizer.is_control(i)]
            while True:
                yield [int(rng.choice(words))]

        every = CHAT_EVERY_WITH_TEXT if texts else CHAT_EVERY
        shape = (n_sequences, length)
        rows = write_text(source, openings(), chat, every, shape, recipe.seed, place, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tokens(path, iter(rows.tolist()), source.spec.vocab)
    return load_shard(path, source, tokenizer.encode, ignore)
