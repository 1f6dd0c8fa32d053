"""From a name on the Hub to a path: choose the files, check the disk, fetch what is missing, check every hash."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from edgekv.errors import InputError, OutputError
from edgekv.files import atomic_path
from edgekv.host.memory import machine_nbytes
from edgekv.models.hub import client
from edgekv.models.hub.names import Choice, HubFile, HubName, choices, choose, parse_name
from edgekv.progress import Progress, Stages, silent

GB, MB = 10**9, 10**6
MARGIN_NBYTES = 64 * MB  # of the disk is left free
SHA256_DIGITS = 64


@dataclass(frozen=True)
class Pulled:
    """A model in the cache.

    Attributes:
        path: the GGUF, the first of its parts, or the folder.
        kind: "GGUF" or "safetensors".
        nbytes: of all its files; `fetched_nbytes` of those that were not there yet.
        commit: of the repository.
    """

    name: str
    path: Path
    kind: str
    nbytes: int
    fetched_nbytes: int
    commit: str


def pull(text: Path | str, progress: Stages = silent, loads: bool = False) -> Pulled:
    """Fetch a model of the Hub, or find it in the cache, and check its SHA-256 once.

    Args:
        text: hf:OWNER/NAME[:QUANT or FILE].
        loads: whether its weights will be kept in memory; those larger than all of it are then not even fetched.

    Raises:
        InputError: no such model, no such file in it, it is gated, the Hub cannot be reached, a hash is wrong.
        OutputError: the disk has no room for it.
        BackendError: huggingface_hub is not installed.
    """
    name = parse_name(text)
    listing, choice = _listed(name)
    if loads:
        _require_ram(name, choice, listing.files)
    places = {file: client.cached_file(name, file, listing.commit) for file in choice.files}
    missing = [file for file, place in places.items() if place is None]
    _require_disk(name, sum(file.nbytes for file in missing))
    for file in missing:
        places[file] = client.download(name, file, progress(f"downloading {Path(file.path).name} (MB)"))
    for file, place in places.items():
        assert place is not None
        if listing.commit not in place.parts:
            raise InputError(f"{name} was changed on the Hub while it was fetched; start it again")
        _check_hash(name, file, place, progress)
    first = places[choice.files[0]]
    assert first is not None
    path = first if choice.first else first.parent
    fetched = sum(file.nbytes for file in missing)
    return Pulled(str(name), path, choice.kind, choice.nbytes, fetched, listing.commit)


def _listed(name: HubName) -> tuple[client.Listing, Choice]:
    """What the Hub has, or without a network what the cache has."""
    try:
        listing = client.list_files(name)
    except client.UnreachableError as error:
        cached = client.list_cached(name)
        if cached is None or not choices(cached.files):
            raise
        try:
            return cached, choose(name, cached.files)
        except InputError as in_cache:
            raise InputError(f"{error} ({in_cache})") from error
    return listing, choose(name, listing.files)


def _require_ram(name: HubName, choice: Choice, files: Sequence[HubFile]) -> None:
    ram = machine_nbytes()
    if choice.nbytes <= ram:
        return
    smaller = [other for other in choices(files) if other.kind == "GGUF" and other.nbytes < 0.8 * ram]
    best = max(smaller, key=lambda other: other.nbytes, default=None)
    advice = f"{HubName(name.repo, best.label or best.first)} would fit" if best else "choose a smaller model"
    raise InputError(
        f"{name} has {choice.nbytes / GB:.1f} GB of weights and this machine {ram / GB:.1f} GB of memory; {advice}"
    )


def _require_disk(name: HubName, nbytes: int) -> None:
    folder = client.cache_folder().absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if nbytes and nbytes + MARGIN_NBYTES > free:
        raise OutputError(
            f"{name} takes {nbytes / GB:.2f} GB and the disk of {folder} has {free / GB:.2f} GB free; free some space "
            "(`hf cache ls` shows what is there), or let HF_HOME name a folder on another disk"
        )


def _check_hash(name: HubName, file: HubFile, place: Path, progress: Stages) -> None:
    """Compare a file with the hash that the Hub names, once as long as it does not change.

    Raises:
        InputError: it differs; it is then removed from the cache.
    """
    if file.digest is None:
        return
    stat = place.stat()
    seen = user_cache_path("edgekv") / "hub" / file.digest
    stamp = f"{stat.st_size} {stat.st_mtime_ns}"
    if seen.is_file() and seen.read_text(encoding="utf-8") == stamp:
        return
    if _digest(place, len(file.digest), progress(f"checking {place.name} (MB)")) != file.digest:
        _remove(place)
        raise InputError(
            f"{name}: {file.path} is not what the Hub says (SHA-256 {file.digest[:12]}...): it came damaged, or what "
            "stands between you and the Hub changed it; it was removed, start it again"
        )
    seen.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(seen, force=True) as partial:
        partial.write_text(stamp, encoding="utf-8")


def _remove(place: Path) -> None:
    """Remove a file of the cache, with all the links that lead to it."""
    while place.is_symlink():
        link, place = place, place.parent / place.readlink()
        link.unlink()
    place.unlink()


def _digest(path: Path, n_digits: int, progress: Progress) -> str:
    """SHA-256 of a file, or where the hash is shorter git's object id (SHA-1 of a header and the file)."""
    total = path.stat().st_size
    digest = (
        hashlib.sha256()
        if n_digits == SHA256_DIGITS
        else hashlib.sha1(b"blob %d\0" % total, usedforsecurity=False)
    )
    done = 0
    with path.open("rb") as file:
        while block := file.read(MB):
            digest.update(block)
            done += len(block)
            progress(done // MB, max(1, total // MB))
    progress(1, 1)
    return digest.hexdigest()
