"""Feeds mutated files to every reader of files that somebody else wrote; `make fuzz` runs it.

    python tests/fuzz/run.py 2000                   2000 mutations of every kind
    python tests/fuzz/run.py 2000 gguf tokenizer    of these
    python tests/fuzz/run.py --one gguf 1234        one of them again, with its traceback

A reader may take a file or raise an EdgeKVError. It may not raise anything else, kill its process, write or remove a
file, start a process, take more than CPU_S seconds, or more than MEMORY_NBYTES. Mutations are the same in every run.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))

CPU_S = 5.0
SILENT_S = 120.0  # without a sign of life a worker is stuck in native code
MEMORY_NBYTES = 2 * 2**30
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
)
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")


class Forbidden(BaseException):
    """A reader did what no reader may; not an Exception, so that no reader catches it."""


_watching = False


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if writes or event in CHANGES or event in STARTS:
        raise Forbidden(f"{event} {arguments[:1]}")


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise Forbidden(f"took more than {CPU_S} s")


@contextmanager
def _watched() -> Iterator[None]:
    """A reader at work."""
    global _watching
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)


def _try_one(kind: str, number: int, seeds: Path) -> str:
    """What came of one mutation: "taken", the class of the EdgeKVError, or what went wrong."""
    from targets import TARGETS

    from edgekv.errors import EdgeKVError

    target, rng = TARGETS[kind], Random(f"{kind} {number}")
    folder = seeds / target.folder
    name = rng.choice(sorted(target.mutators))
    sound = (folder / name).read_bytes()
    (folder / name).write_bytes(target.mutators[name](rng, sound))
    try:
        with _watched():
            target.read(folder, name)
        return "taken"
    except EdgeKVError as error:
        return type(error).__name__
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"!{name}: {type(error).__name__} at {where}: {str(error)[:200]}"
    finally:
        (folder / name).write_bytes(sound)


def _work(seeds: Path) -> None:
    """The worker: a line of JSON for each mutation that standard input names."""
    import targets  # noqa: F401  (before memory is limited)

    sys.addaudithook(_audit)
    signal.signal(signal.SIGPROF, _out_of_time)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_NBYTES,) * 2)
    for line in sys.stdin:
        kind, number = json.loads(line)
        print(json.dumps(_try_one(kind, number, seeds)), flush=True)


class Worker:
    """A process that tries mutations, with files of its own."""

    def __init__(self, folder: Path) -> None:
        self._errors = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(folder / "seeds")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "RAYON_NUM_THREADS": "1"},
        )

    def ask(self, kind: str, number: int) -> str:
        """What came of one mutation; a death or silence of the process too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, number]) + "\n")
        self._process.stdin.flush()
        signal.alarm(int(SILENT_S))
        try:
            line = self._process.stdout.readline()
        except TimeoutError:
            self._process.kill()
            line = ""
        finally:
            signal.alarm(0)
        if line:
            return str(json.loads(line))
        self._errors.seek(0)
        last = self._errors.read()[-300:].strip().replace("\n", " ")
        return f"!the process died: exit code {self._process.wait()} {last}"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def run(count: int, kinds: list[str]) -> dict[str, Counter[str]]:
    """Outcomes by kind of `count` mutations each; what went wrong begins with "!" and its number."""
    from seeds import write_seeds

    def no_answer(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, no_answer)
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="edgekv-fuzz-") as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        write_seeds(folder / "seeds")
        shutil.copytree(folder / "seeds", folder / "sound")
        worker = Worker(folder)
        for kind in kinds:
            found[kind] = Counter()
            for number in range(count):
                outcome = worker.ask(kind, number)
                if outcome.startswith("!"):
                    outcome = f"!{number} {outcome[1:]}"
                    print(kind, outcome[1:], file=sys.stderr, flush=True)
                found[kind][outcome] += 1
                if not worker.alive:
                    worker.close()
                    shutil.rmtree(folder / "seeds")
                    shutil.copytree(folder / "sound", folder / "seeds")
                    worker = Worker(folder)
            if sys.stderr.isatty() or count > 100:
                print(f"{kind}: {_told(found[kind])}", file=sys.stderr, flush=True)
        worker.close()
    signal.signal(signal.SIGALRM, before)
    return found


def _told(outcomes: Counter[str]) -> str:
    wrong = sum(n for outcome, n in outcomes.items() if outcome.startswith("!"))
    good = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common() if not outcome.startswith("!"))
    return f"{good}, {wrong} WRONG" if wrong else good


def main() -> None:
    from targets import TARGETS

    count, kinds = int(sys.argv[1]), sys.argv[2:] or list(TARGETS)
    wrong = [
        f"{kind} {outcome[1:]}" for kind, outcomes in run(count, kinds).items()
        for outcome in outcomes if outcome.startswith("!")
    ]  # fmt: skip
    print(*wrong, sep="\n")
    print(f"{count} mutations of each of {len(kinds)} kinds, {len(wrong)} went wrong")
    sys.exit(bool(wrong))


def _show_one(kind: str, number: int) -> None:
    """Try one mutation in this process, and leave its file behind."""
    from seeds import write_seeds
    from targets import TARGETS

    folder = Path(tempfile.mkdtemp(prefix="edgekv-fuzz-"))
    write_seeds(folder)
    target, rng = TARGETS[kind], Random(f"{kind} {number}")
    name = rng.choice(sorted(target.mutators))
    path = folder / target.folder / name
    path.write_bytes(target.mutators[name](rng, path.read_bytes()))
    print(path)
    target.read(folder / target.folder, name)


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        _work(Path(sys.argv[2]))
    elif sys.argv[1] == "--one":
        _show_one(sys.argv[2], int(sys.argv[3]))
    else:
        main()
