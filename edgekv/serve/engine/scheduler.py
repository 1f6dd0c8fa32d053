"""Continuous batching: in every step each answer gets its next token, and one prompt a slice beside them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from edgekv.backends.sequences import Piece, Sequences
from edgekv.chat.session import PromptFormat
from edgekv.documents import encode
from edgekv.errors import EdgeKVError, InputError, to_wire
from edgekv.serve.engine.disk import Disk
from edgekv.serve.engine.grammar import ANY_OBJECT, Grammars
from edgekv.serve.engine.job import Job, Wanted, make_job
from edgekv.serve.engine.packs import Chosen, PackFolder
from edgekv.serve.engine.prefixes import Prefixes
from edgekv.serve.engine.rates import FIRST_TPS, MIN_SLICE, Rates
from edgekv.tokenizer.language import Language, opening_tokens

SLICE_S, LONE_SLICE_S = 0.25, 1.0  # how long a slice of a prompt may hold up others' tokens, or a new request
STATS_EVERY_S = 0.5

Send = Callable[[dict[str, Any]], None]


class Scheduler:
    """Runs jobs over one model; at most engine.n_parallel at a time, which whoever starts them sees to.

    Attributes:
        prefixes: what its cache holds.
        rates: how fast it was.

    Args:
        send: takes messages for the parent: {"id": job, "n_prompt", "n_reused"} once a job begins, {"id", "n_read"}
            after each slice of its prompt; {"id", "text", "token"[, "logprobs"]} for each token, with "finish",
            "n_generated" and "n_reused" for the last; or {"id", "error": (class, message)}; and {"stats": {...}}.
    """

    def __init__(
        self,
        engine: Sequences,
        language: Language,
        send: Send,
        packs: PackFolder | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._engine, self._language, self._send = engine, language, send
        self._packs, self._disk = packs, disk
        self.prefixes = Prefixes(engine, disk, packs)
        self.rates = Rates()
        self._grammars = Grammars(language, engine.n_vocab)
        self._format: PromptFormat | None = None
        self._jobs: dict[int, Job] = {}
        self._reading: deque[Job] = deque()  # those whose prompt is not read yet; the first is next
        self._prefill_tps = FIRST_TPS
        self._totals = dict.fromkeys(("n_reused", "n_prefilled", "n_generated", "n_steps", "busy_s"), 0.0)
        self._told, self._told_at = dict(self._totals), 0.0

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._jobs)

    def start(
        self,
        id: int,
        messages: list[dict[str, str]] | None,
        text: str | None,
        tokens: list[int] | None,
        json_object: bool,
        packs: Sequence[str] = (),
        said: Sequence[int] = (),
        **wanted: Any,
    ) -> None:
        """Begin a job on a conversation, a text or tokens, behind packs; other arguments are fields of Wanted."""
        try:
            prompt, chosen = self.prompt_of(messages, text, tokens, packs)
            if not 0 < len(prompt) < self._engine.n_ctx:
                raise InputError(
                    f"the prompt takes {len(prompt)} tokens and the context holds {self._engine.n_ctx}; "
                    + ("shorten it" if prompt else "send some text")
                )
            wish = Wanted(**wanted | {"stop": tuple(wanted["stop"]), "said": tuple(said)})
            schema = ANY_OBJECT if json_object else wish.schema
            grammar = None if schema is None else self._grammars.of_schema(schema)
            job = make_job(id, prompt, wish, self._language, self._engine, grammar, self.prefixes, chosen)
        except Exception as error:
            self._send({"id": id, "error": to_wire(error)})
            return
        self._jobs[id] = job
        self._reading.append(job)
        self._totals["n_reused"] += job.n_reused
        self._send({"id": id, "n_prompt": len(job.prompt), "n_reused": job.n_reused})

    def stop(self, id: int) -> None:
        """End a job whose answer nobody wants any more; one that has ended already is no mistake."""
        if id in self._jobs:
            self._end(self._jobs[id])

    def step(self) -> None:
        """Run one batch."""
        began = time.perf_counter()
        jobs = [job for job in self._jobs.values() if job.answering]
        pieces = [Piece(job.rows.sequence, len(job.rows.tokens), job.feed, logits=True) for job in jobs]
        if self._reading:
            job = self._reading[0]
            self._reading.rotate(-1)
            jobs.append(job)
            pieces.append(
                self._slice(job, self._engine.n_batch - len(pieces), LONE_SLICE_S if not pieces else SLICE_S)
            )
        try:
            self.prefixes.make_room(sum(len(piece.tokens) for piece in pieces))
            rows = iter(self._engine.run(pieces))
        except EdgeKVError as error:
            for job in jobs:
                self._fail(job, error)
            return
        seconds = time.perf_counter() - began
        self.rates.ran(pieces, seconds)
        self._count(pieces, seconds)
        for job, piece in zip(jobs, pieces, strict=True):
            self.prefixes.appended(job.rows, piece.tokens)
            if not piece.logits:
                self._send({"id": job.id, "n_read": len(job.rows.tokens)})
                continue
            if not job.answering:
                self._reading.remove(job)
            try:
                self._send(job.accept(next(rows)))
            except Exception as error:
                self._fail(job, error)
                continue
            if job.finish:
                self._end(job)

    def tell(self) -> None:
        """Send figures, if it is time or nothing is left to do."""
        now = time.monotonic()
        elapsed = now - self._told_at
        if self.busy and elapsed < STATS_EVERY_S:
            return
        seconds = self._totals["busy_s"] - self._told["busy_s"] or 1.0
        rates = {
            f"{name}_tps": (self._totals[f"n_{name}"] - self._told[f"n_{name}"]) / seconds
            for name in ("prefilled", "generated")
        }
        self._told, self._told_at = dict(self._totals), now
        cells = {
            "n_running": len(self._jobs),
            "cells_used": self.prefixes.used_cells,
            "cells_kept": self.prefixes.kept_cells,
        }
        disk = self._disk.figures() if self._disk else {}
        speeds = {"rates": encode(self.rates.now()), "unread_s": self._unread_s()}
        self._send({"stats": self._totals | rates | cells | disk | speeds})

    def _unread_s(self) -> float:
        """Seconds that the prompts will take which are not read yet."""
        prefill, depths = self.rates.prefill, [(job, len(job.rows.tokens)) for job in self._reading]
        return sum(prefill.seconds(len(job.prompt) - depth, depth) for job, depth in depths)

    def save_one(self) -> bool:
        """While nothing is to do: put something on the disk, if it is not there yet; whether there was something."""
        return self._disk is not None and self.prefixes.save_one()

    def end(self) -> None:
        """Put all on the disk."""
        self.prefixes.save_all()

    def prompt_of(
        self,
        messages: list[dict[str, str]] | None,
        text: str | None,
        tokens: list[int] | None,
        packs: Sequence[str],
    ) -> tuple[list[int], Chosen | None]:
        """The tokens of a conversation, a text or tokens behind packs, and those packs.

        Raises:
            InputError: a pack or a token is not there, or the model has no chat template.
            ModelFileError: the template refused or failed.
        """
        chosen = self._choose(packs, messages is not None) if packs else None
        return self._prompt(messages, text, tokens, chosen), chosen

    def _choose(self, names: Sequence[str], chat: bool) -> Chosen:
        if self._packs is None:
            raise InputError("this server has no packs; start it with --packs")
        before = self._chats().before_documents() if chat else opening_tokens(self._language)
        return self._packs.choose(names, before)

    def _chats(self) -> PromptFormat:
        if self._format is None:
            self._format = PromptFormat.of_model(self._language)
        return self._format

    def _prompt(
        self,
        messages: list[dict[str, str]] | None,
        text: str | None,
        tokens: list[int] | None,
        packs: Chosen | None,
    ) -> list[int]:
        if messages is not None:
            return self._chats().of_messages(messages, packs.documents if packs else ())
        before = packs.tokens if packs else []
        if tokens is None:
            assert text is not None
            opening = [] if packs else opening_tokens(self._language)
            return before + opening + self._language.encode(text, parse_special=True)
        if any(not 0 <= token < self._engine.n_vocab for token in tokens):
            raise InputError(f"a token of the prompt is outside the vocabulary of {self._engine.n_vocab}")
        return before + tokens

    def _slice(self, job: Job, most: int, seconds: float) -> Piece:
        """The next tokens of a prompt, after what others have computed of it meanwhile."""
        before = len(job.rows.tokens)
        self.prefixes.grow(job.rows, job.prompt, job.blocks)
        start = len(job.rows.tokens)
        job.n_reused += start - before
        self._totals["n_reused"] += start - before
        size = max(MIN_SLICE, int(self._prefill_tps * seconds))
        tokens = job.prompt[start : start + min(most, size)]
        return Piece(job.rows.sequence, start, tokens, logits=start + len(tokens) == len(job.prompt))

    def _count(self, pieces: list[Piece], seconds: float) -> None:
        n_generated = sum(piece.logits for piece in pieces)
        n_prefilled = sum(len(piece.tokens) for piece in pieces if len(piece.tokens) > 1)
        if n_prefilled >= MIN_SLICE:
            self._prefill_tps += (n_prefilled / seconds - self._prefill_tps) / 2
        for name, value in (
            ("n_prefilled", n_prefilled),
            ("n_generated", n_generated),
            ("n_steps", 1),
            ("busy_s", seconds),
        ):
            self._totals[name] += value

    def _fail(self, job: Job, error: Exception) -> None:
        self._send({"id": job.id, "error": to_wire(error)})
        self._end(job, keep=False)

    def _end(self, job: Job, keep: bool = True) -> None:
        del self._jobs[job.id]
        if job in self._reading:
            self._reading.remove(job)
        self.prefixes.finish(job.rows, keep)
