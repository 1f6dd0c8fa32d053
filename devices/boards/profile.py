"""Board profiles: the figures that plans need of machines they do not run on, each with its source."""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from msgspec import Meta
from msgspec.structs import replace

from edgekv import documents
from edgekv.backends.llama_cpp.footprint import RUNTIME_NBYTES
from edgekv.devices.reporting.report import Machine
from edgekv.documents import Document, SchemaError
from edgekv.errors import InputError

PROFILES = Path(__file__).parent
# Machines whose speed follows the same rules; each has its coefficients in speed.json.
Kind = Literal["arm", "arm-dotprod", "x86", "igpu", "gpu", "gpu-hbm"]
GPU_KINDS = ("igpu", "gpu", "gpu-hbm")
T = TypeVar("T")


class _Figure(Document, Generic[T], frozen=True):
    value: T
    source: Annotated[str, Meta(min_length=1)]


class _Profile(Document, frozen=True, kw_only=True):
    """A profile's TOML file; `cores` and `clock_ghz` are needed where the model runs on the CPU."""

    name: str
    kind: Kind
    soc: str
    memory: str
    aliases: tuple[str, ...]
    isa: tuple[str, ...]
    matches: tuple[str, ...]
    ram_mib: _Figure[tuple[int, ...]]
    read_gb_s: _Figure[dict[str, float]]
    os_mib: _Figure[int]
    cores: _Figure[int] | None = None
    clock_ghz: _Figure[float] | None = None
    prefill_gflops: _Figure[float] | None = None
    decode_w: _Figure[float] | None = None


WORDS = ("name", "kind", "soc", "memory", "aliases", "isa", "matches")
NUMBERS = tuple(name for name in _Profile.__struct_fields__ if name not in WORDS)


@dataclass(frozen=True)
class Board:
    """One machine.

    `ram_mib` lists the sizes that it is sold with; `read_gb_s` is the read bandwidth by number of threads (of
    the whole card for a GPU, where `cores` and `clock_ghz` play no part); `os_mib` is the memory that the
    system takes before any program starts; `prefill_gflops` is what a GPU's prefill reaches; `decode_w` is
    the power while decoding; `runtime_nbytes` is what a process holds there before any model.
    """

    key: str
    name: str
    kind: str
    soc: str
    memory: str
    aliases: tuple[str, ...]
    isa: tuple[str, ...]
    matches: tuple[str, ...]
    ram_mib: tuple[int, ...]
    read_gb_s: Mapping[int, float]
    os_mib: int
    sources: Mapping[str, str]
    cores: int = 1
    clock_ghz: float = 1.0
    prefill_gflops: float | None = None
    decode_w: float | None = None
    runtime_nbytes: int = RUNTIME_NBYTES

    @property
    def is_gpu(self) -> bool:
        """Whether the model runs on a GPU of this board."""
        return self.kind in GPU_KINDS

    def bandwidth_gb_s(self, threads: int) -> float:
        """Read bandwidth at a number of threads: interpolated between the measured ones, flat outside."""
        known = sorted(self.read_gb_s.items())
        for (low, slow), (high, fast) in itertools.pairwise(known):
            if low <= threads <= high:
                return slow + (fast - slow) * (threads - low) / (high - low)
        return known[0][1] if threads < known[0][0] else known[-1][1]


def load_boards() -> dict[str, Board]:
    """Every profile in this folder by its key, in the order of their RAM and name."""
    boards = [parse_board(path.stem, path.read_text(encoding="utf-8")) for path in PROFILES.glob("*.toml")]
    return {board.key: board for board in sorted(boards, key=lambda b: (b.is_gpu, b.ram_mib[-1], b.name))}


def parse_board(key: str, text: str) -> Board:
    """One profile from its TOML text.

    Raises:
        InputError: a key is missing, unknown, without a source, or holds the wrong kind of value.
    """
    try:
        profile = documents.decode(_Profile, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"board profile {key}: not valid TOML: {error}") from error
    except SchemaError as error:
        raise InputError(f"board profile {key}: {error}") from error
    figures = {name: found for name in NUMBERS if (found := getattr(profile, name)) is not None}
    if profile.kind not in GPU_KINDS and (missing := {"cores", "clock_ghz"} - figures.keys()):
        raise InputError(f"board profile {key}: {min(missing)}: missing")
    values = {name: figure.value for name, figure in figures.items()}
    values["read_gb_s"] = {int(threads): gb_s for threads, gb_s in profile.read_gb_s.value.items()}
    words = {name: getattr(profile, name) for name in WORDS}
    return Board(key=key, **words, **values, sources={name: each.source for name, each in figures.items()})


def find_board(name: str) -> Board:
    """The board of that key, alias or name, in any case.

    Raises:
        InputError: there is none; the message suggests the nearest.
    """
    boards = load_boards()
    names = {
        alias.lower(): board for board in boards.values() for alias in (board.key, board.name, *board.aliases)
    }
    wanted = name.strip().lower().replace("_", "-")
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    keys = list(dict.fromkeys(names[match].key for match in near))
    hint = f"did you mean {' or '.join(keys)}?" if keys else f"known: {', '.join(boards)}"
    raise InputError(f"no board {name!r}; {hint} (`edgekv plan --list-boards` prints all)")


def match_board(machine: Machine) -> Board | None:
    """The profile of the machine at hand, if its model or CPU names one."""
    said = [machine.board, *(group.name for group in machine.cores)]
    found = [
        (len(pattern), board)
        for board in load_boards().values()
        for pattern in board.matches
        if any(pattern in text for text in said)
    ]
    return max(found, key=lambda item: item[0])[1] if found else None


def known_memory(machine: Machine, notes: tuple[str, ...]) -> tuple[Machine, tuple[str, ...]]:
    """A probed machine and its notes, its memory type filled in from the board's profile if not known."""
    board = match_board(machine)
    if machine.memory_type is not None or board is None or board.is_gpu:
        return machine, notes
    kept = tuple(note for note in notes if not note.startswith("memory type"))
    return replace(machine, memory_type=board.memory), (
        *kept,
        f"memory type from the profile of {board.name}",
    )
