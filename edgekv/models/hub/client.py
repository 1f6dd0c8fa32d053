"""The one module that imports huggingface_hub: listings, downloads and what its cache holds.

The library keeps the cache, the token, offline mode and gated models, and goes on after a connection is cut; here its
errors become EdgeKV's, which say what to do next.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgekv.errors import BackendError, InputError, OutputError
from edgekv.models.hub.names import PREFIX, Choice, HubFile, HubName, choices
from edgekv.progress import Progress

MB = 10**6
BRANCH = "main"


class UnreachableError(InputError):
    """The Hub does not answer, or may not be asked."""


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    commit: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache: `name` is what opens it, `path` where it lies."""

    name: str
    kind: str
    nbytes: int
    commit: str
    path: Path


def cache_folder() -> Path:
    """huggingface_hub's cache: HF_HUB_CACHE, or hub/ in HF_HOME, or ~/.cache/huggingface/hub."""
    return Path(_library().constants.HF_HUB_CACHE)


def list_files(name: HubName) -> Listing:
    """What the Hub has of a repository on its main branch, with sizes and hashes.

    Raises:
        InputError: there is no such repository for this user.
        UnreachableError: the Hub cannot be asked.
    """
    with _explained(name):
        found = _library().HfApi().model_info(name.repo, revision=BRANCH, files_metadata=True, timeout=20)
    files = [
        HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in found.siblings or ()
    ]
    return Listing(str(found.sha), tuple(files))


def list_cached(name: HubName) -> Listing | None:
    """What the cache has of a repository's main branch; None without any."""
    repo = cache_folder() / ("models--" + name.repo.replace("/", "--"))
    try:
        commit = (repo / "refs" / BRANCH).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return Listing(commit, tuple(_files_in(repo / "snapshots" / commit)))


def cached_file(name: HubName, file: HubFile, commit: str) -> Path | None:
    """A file in the cache; None where it is not."""
    found = _library().try_to_load_from_cache(name.repo, file.path, revision=commit)
    return Path(found) if isinstance(found, str) else None


def download(name: HubName, file: HubFile, progress: Progress) -> Path:
    """Fetch a file of the main branch into the cache; units of progress are megabytes.

    Raises:
        InputError: as `list_files` does, or the connection was cut for good.
        OutputError: the disk is full.
    """

    class Bar(_Bar):
        report = staticmethod(progress)

    with _explained(name):
        return Path(_library().hf_hub_download(name.repo, file.path, revision=BRANCH, tqdm_class=Bar))


def cached_models() -> list[CachedModel]:
    """Every model that is whole in the cache, the largest first."""
    library = _library()
    try:
        cache = library.scan_cache_dir(cache_folder())
    except library.errors.CacheNotFound:
        return []
    found = []
    for repo in cache.repos:
        if repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            for choice in choices(_files_in(Path(revision.snapshot_path))):
                path = Path(revision.snapshot_path) / choice.first
                found.append(
                    CachedModel(
                        _full_name(repo.repo_id, choice),
                        choice.kind,
                        choice.nbytes,
                        revision.commit_hash,
                        path,
                    )
                )
    return sorted(found, key=lambda model: (-model.nbytes, model.name))


def _full_name(repo: str, choice: Choice) -> str:
    return str(HubName(repo, choice.label or choice.first))


def _files_in(snapshot: Path) -> Iterator[HubFile]:
    """Files of a snapshot, whose blobs bear their hash as a name; links that lead nowhere are left out."""
    for path in sorted(snapshot.rglob("*")):
        if path.is_file():
            digest = path.readlink().name if path.is_symlink() else None
            yield HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, digest)


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise BackendError(f"{PREFIX} needs huggingface_hub: pip install 'edgekv[hub]'") from error
    if int(huggingface_hub.__version__.partition(".")[0]) < 1:
        raise BackendError(
            f"huggingface_hub {huggingface_hub.__version__} is too old for {PREFIX}: pip install -U 'edgekv[hub]'"
        )
    return huggingface_hub


class _Bar:
    """A tqdm, as far as huggingface_hub uses one, that tells a Progress."""

    report: Progress

    def __init__(self, *, total: int | None = None, initial: int = 0, **_: Any) -> None:
        self.total = total or 0
        self.n = initial

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def update(self, n: float | None = 1) -> None:
        """`n` more bytes are on the disk."""
        self.n += int(n or 0)
        if self.n < self.total:
            self.report(self.n // MB, max(1, self.total // MB))

    def update_transfer(self, n: int) -> None:
        """`n` more bytes came over the network."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """Figures that the library adds to a bar; none."""
        return {}

    def set_postfix_str(self, text: str = "", refresh: bool = True) -> None:
        """Words behind a bar."""

    def refresh(self) -> None:
        """Draw it again."""

    def close(self) -> None:
        """The stage is over."""
        self.report(1, 1)


@contextlib.contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Errors of the library as EdgeKV's; its own warnings, which say less, are not shown."""
    library = _library()
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except library.errors.HFValidationError as error:
        raise InputError(f"{name} is not a name of the Hub; copy OWNER/NAME from the model's page") from error
    except (library.errors.HfHubHTTPError, OSError, *_transport_errors(library)) as error:
        raise _known(name, error) from error
    finally:
        log.setLevel(level)


def _transport_errors(library: Any) -> tuple[type[Exception], ...]:
    """The base class of its HTTP client's errors (httpx, or its successor), without naming that client."""
    return tuple(base for base in library.errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _known(name: HubName, error: Any) -> Exception:
    library = _library()
    errors = library.errors
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why the Hub could not say where the file is
    status = getattr(getattr(error, "response", None), "status_code", 0)
    endpoint = library.constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{name} is gated ({status}): accept its terms on {endpoint}/{name.repo}, then log in with `hf auth login` "
            "or set HF_TOKEN; fetching it again then works"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{name}: {endpoint} has no model {name.repo} that you may see ({status}); {_nearest(name)}, and for a "
            "private one log in with `hf auth login` or set HF_TOKEN"
        )
    if status in (401, 403):
        return InputError(
            f"{name}: {endpoint} refuses your token ({status}); make one that may read this model on "
            f"{endpoint}/settings/tokens, then `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UnreachableError(
            f"{name}: HF_HUB_OFFLINE is set; unset it to fetch what is not in {cache_folder()}"
        )
    if status:
        return InputError(f"{name}: {endpoint} answers {status}; wait a minute and start it again")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return OutputError(
            f"{name}: writing in {cache_folder()} failed: {error.strerror}; free some space (`hf cache ls` shows what "
            "is there), or let HF_HOME name a folder on another disk, and start it again"
        )
    return UnreachableError(
        f"{name}: {endpoint} cannot be reached, or the connection broke for good "
        f"({type(error).__name__}); "
        "check the network and start it again: files that are whole stay, and what is in the cache works without it"
    )


def _nearest(name: HubName) -> str:
    """Names like this one, by its owner's models and by those that contain its name."""
    owner, _, model = name.repo.rpartition("/")
    api, found = _library().HfApi(), []
    for wanted in ({"author": owner}, {"search": model}):
        with contextlib.suppress(Exception):  # whatever is wrong now, the first error is what matters
            found += [each.id for each in api.list_models(**wanted, limit=200)]
    near = get_close_matches(name.repo, dict.fromkeys(found), 3, 0.6)
    if not near:
        return "check the name on its page"
    return "did you mean " + " or ".join(f"{PREFIX}{each}" for each in near)
