"""What servers say to each other, as JSON; all of it is checked when it is read, whoever it comes from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from edgekv.documents import Document
from edgekv.serve.engine.exchange import MARK_NBYTES

VERSION = 1  # of these messages
BEAT_S = 0.5  # between two signs of life of a server that answers
MAX_LINE_NBYTES = 2**20  # of an event
MAX_NOISE_NBYTES = 4 * 2**20  # of a measurement of the link
MAX_CATALOGUE_NBYTES = 16 * 2**20

STATE, CATALOGUE, NOISE, ANSWER, ROWS = (
    f"/peer/{name}" for name in ("state", "catalogue", "noise", "answer", "rows")
)

T = TypeVar("T")
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=200)]


class PeerState(Document, frozen=True):
    """How a server is now.

    Attributes:
        fingerprint: of its model and of the layout of its rows.
        generation: of its catalogue.
        packs: names of those that requests can name.
        prefill, short: coefficients of edgekv.route.cost.Prefill.
        decode_s, save_s, load_s, wait_s: fields of edgekv.route.cost.Site.
    """

    version: int
    fingerprint: Text
    n_ctx: Count
    generation: Text
    packs: tuple[str, ...]
    prefill: tuple[Seconds, Seconds, Seconds]
    short: tuple[Seconds, Seconds, Seconds]
    decode_s: Seconds
    save_s: Seconds
    load_s: Seconds
    wait_s: Seconds


class RowsWanted(Document, frozen=True):
    """A request for the rows of `count` tokens, which end with the block of this hash (hexadecimal)."""

    block: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    count: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class JobWanted(Document, frozen=True):
    """A request that another server got: arguments of edgekv.serve.engine.scheduler.Scheduler.start."""

    messages: list[dict[str, str]] | None
    text: str | None
    tokens: list[Count] | None
    json_object: bool
    schema: str | None
    packs: list[str]
    sampling: dict[str, float | int]
    max_tokens: Count | None
    stop: list[str]
    top_logprobs: Count | None
    said: tuple[Count, ...] = ()


class PeerEvent(Document, frozen=True, omit_defaults=True):
    """An event of an answer (edgekv.serve.engine.scheduler); the last has `finish` or `error`."""

    n_prompt: Count | None = None
    n_reused: Count | None = None
    n_read: Count | None = None
    text: str | None = None
    token: Count | None = None
    logprobs: list[tuple[tuple[str, float], list[tuple[str, float]]]] | None = None
    finish: Literal["stop", "length"] | None = None
    n_generated: Count | None = None
    error: tuple[str, str] | None = None

    def plain(self) -> dict[str, Any]:
        """The event as the engine's own come."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None}


class Catalogue:
    """Which blocks a server has: the first bytes of their hashes. About one in 2^32 others seems to be there too."""

    def __init__(self, marks: bytes = b"") -> None:
        size = MARK_NBYTES
        self._marks = frozenset(marks[at : at + size] for at in range(0, len(marks) - size + 1, size))

    def __len__(self) -> int:
        return len(self._marks)

    def depth(self, blocks: list[bytes]) -> int:
        """How many of a prompt's first blocks are there."""
        marks = (block[:MARK_NBYTES] in self._marks for block in blocks)
        return next((depth for depth, there in enumerate(marks) if not there), len(blocks))
