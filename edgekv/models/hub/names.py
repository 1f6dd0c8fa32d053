"""Names of models on the Hugging Face Hub, and which files of a repository they mean. No network here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from edgekv.errors import InputError

PREFIX = "hf:"
FORM = "hf:OWNER/NAME, hf:OWNER/NAME:QUANT or hf:OWNER/NAME:FILE"
FOLDER = "safetensors"  # asks for the Hugging Face folder where a repository has GGUFs too
# What is taken where nobody asks: four bits lose little and fit, then upwards, then what loses more or is large.
PREFERRED = (
    "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q6_K", "Q8_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "BF16", "F16", "F32",
)  # fmt: skip

_NAME = re.compile(r"/{0,2}(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<wanted>.+))?", re.ASCII)
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32))(?=[-./]|$)", re.IGNORECASE
)
_NO_MODEL = re.compile(r"(?:^|/)(?:mmproj|imatrix)|[-._]imatrix[-.]", re.IGNORECASE)
_FOLDER_FILES = re.compile(r"[^/]+\.(?:safetensors|json|jinja)|tokenizer\.model")


@dataclass(frozen=True)
class HubName:
    """A repository, and what of it: a file, a quantization, or `FOLDER`; None is EdgeKV's choice."""

    repo: str
    wanted: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f":{self.wanted}" if self.wanted else "")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest`: SHA-256 of one in LFS, else the object id of git; None if nobody says."""

    path: str
    nbytes: int
    digest: str | None = None


@dataclass(frozen=True)
class Choice:
    """Files that make one model. `first`: the one to open, "" for the folder itself; `label`: its quantization."""

    kind: Literal["GGUF", "safetensors"]
    first: str
    label: str
    files: tuple[HubFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


def is_hub_name(path: Path | str) -> bool:
    """Whether this is a name on the Hub rather than a path."""
    return str(path).startswith(PREFIX)


def parse_name(text: Path | str) -> HubName:
    """The repository and what of it.

    Raises:
        InputError: it does not have the form.
    """
    found = _NAME.fullmatch(str(text).removeprefix(PREFIX))
    if not is_hub_name(text) or found is None:
        raise InputError(f"{text} is not a model on the Hub; write {FORM}")
    return HubName(found["repo"], found["wanted"])


def choose(name: HubName, files: Sequence[HubFile]) -> Choice:
    """The files of a repository that a name means.

    Raises:
        InputError: it has none of them; the message names what it has.
    """
    found = choices(files)
    if not found:
        raise InputError(
            f"{name} holds neither a GGUF nor safetensors with a config.json that EdgeKV could read; choose another "
            "repository of the model, such as one whose name ends in -GGUF"
        )
    if name.wanted is None:
        return min(found, key=_rank)
    fitting = [choice for choice in found if _fits(choice, name.wanted)]
    if not fitting:
        offered = {choice.label or choice.first: choice for choice in found}
        near = get_close_matches(name.wanted.upper(), offered, 3, 0.5) or list(offered)[:12]
        raise InputError(f"{name}: there is no {name.wanted!r} in {name.repo}; it has {', '.join(near)}")
    return min(fitting, key=_rank)


def choices(files: Iterable[HubFile]) -> list[Choice]:
    """Every model that is whole among the files: GGUFs, split ones as one, and a Hugging Face folder."""
    listed = list(files)
    split: dict[tuple[str, int], dict[int, HubFile]] = {}
    found = []
    for file in listed:
        if not file.path.lower().endswith(".gguf") or _NO_MODEL.search(file.path):
            continue
        if part := _PART.fullmatch(file.path):
            split.setdefault((part["stem"], int(part["count"])), {})[int(part["number"])] = file
        else:
            found.append(Choice("GGUF", file.path, _label(file.path), (file,)))
    for (stem, count), parts in split.items():
        if set(parts) == set(range(1, count + 1)):
            whole = tuple(parts[number] for number in sorted(parts))
            found.append(Choice("GGUF", whole[0].path, _label(stem), whole))
    inside = tuple(file for file in listed if _FOLDER_FILES.fullmatch(file.path))
    if any(file.path == "config.json" for file in inside) and any(
        file.path.endswith(".safetensors") for file in inside
    ):
        found.append(Choice("safetensors", "", FOLDER, inside))
    return found


def _fits(choice: Choice, wanted: str) -> bool:
    if any(file.path == wanted for file in choice.files):
        return choice.kind == "GGUF" or wanted == FOLDER
    return choice.label.upper() in (wanted.upper(), f"UD-{wanted.upper()}")


def _rank(choice: Choice) -> tuple[bool, int, int, str]:
    known = choice.label.upper() in PREFERRED
    order = PREFERRED.index(choice.label.upper()) if known else len(PREFERRED)
    return choice.kind != "GGUF", order, choice.nbytes, choice.first


def _label(path: str) -> str:
    """The quantization in a file's name, in capitals; "" without one."""
    found = _LABEL.findall(re.sub(r"\.gguf$", "", path, flags=re.IGNORECASE))
    return found[-1].upper() if found else ""
