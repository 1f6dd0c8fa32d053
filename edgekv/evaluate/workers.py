"""Worker processes, each with the model, for units of work such as windows or questions.

One thread in each of n processes beats n threads in one: small matrices do not divide well, and the statistics
between two batches keep no other core waiting. llama.cpp maps its weights, so its processes share them. A crash
of native code takes a worker down and becomes a BackendError.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from edgekv.backends.base import Backend
from edgekv.backends.isolated.child import cause_of_death
from edgekv.errors import BackendError, EdgeKVError
from edgekv.evaluate.model_under_test import ModelUnderTest, engine_path, open_engine, weights_nbytes
from edgekv.host.threads import default_threads
from edgekv.progress import Progress

Unit = Callable[[Backend, Any], Any]  # a function at the top of a module: it is sent to the workers by name
JOB_NBYTES = 512 * 2**20  # memory of a worker, beside the weights
BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
Workers = Mapping[Connection, BaseProcess]


@dataclass(frozen=True)
class Run:
    """How a measurement is carried out; nothing here changes its figures.

    `folder` keeps journals, references and copies of weights. `jobs` is by default one per core, as far as free
    memory holds a model in each; a single one runs in this process. `threads` is the total of all jobs.
    `fresh` forgets what earlier runs left.
    """

    folder: Path
    progress: Progress
    jobs: int | None = None
    threads: int | None = None
    fresh: bool = False

    def jobs_for(self, subject: ModelUnderTest) -> int:
        """How many processes run the subject."""
        if self.jobs is not None:
            return self.jobs
        fitting = psutil.virtual_memory().available // (weights_nbytes(subject) + JOB_NBYTES)
        return max(1, min(self.threads or default_threads(), int(fitting)))

    def threads_per_job(self, jobs: int) -> int:
        """Engine threads of each process."""
        return max(1, (self.threads or default_threads()) // jobs)


def run_units(
    subject: ModelUnderTest, n_ctx: int, run: Run, unit: Unit, items: Iterable[Any]
) -> Iterator[Any]:
    """unit(backend, item) of each item, in their order.

    Raises:
        InputError: an option is impossible, or the file is malformed or unsupported.
        BackendError: the engine is not installed, failed, or its process died.
    """
    jobs = run.jobs_for(subject)
    threads = run.threads_per_job(jobs)
    if jobs == 1:
        with open_engine(subject, n_ctx, run.folder, threads) as backend:
            for item in items:
                yield unit(backend, item)
        return
    engine_path(subject, run.folder)  # a copy of the weights is made once, not by each worker
    with _workers(jobs, threads, (subject, n_ctx, run.folder, threads, unit)) as workers:
        yield from _in_order(workers, iter(items))


def _in_order(workers: Workers, items: Iterator[Any]) -> Iterator[Any]:
    results: dict[int, Any] = {}
    idle = list(workers)
    busy: dict[Connection, int] = {}
    sent = given = 0
    while True:
        # Results wait for earlier ones, so no worker may run far ahead of the slowest.
        while idle and sent - given <= 2 * len(workers) and (item := next(items, None)) is not None:
            worker = idle.pop()
            _send(worker, workers[worker], item)
            busy[worker] = sent
            sent += 1
        if not busy:
            return
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            results[busy.pop(ready)] = _receive(ready, workers[ready])
            idle.append(ready)
        while given in results:
            yield results.pop(given)
            given += 1


@contextmanager
def _workers(jobs: int, threads: int, arguments: tuple[Any, ...]) -> Iterator[Workers]:
    """Started processes by the pipe to each; all are gone at the end."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        with _blas_threads(threads):
            for _ in range(jobs):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process
        yield workers
    finally:
        for pipe, process in workers.items():
            pipe.close()
            process.kill()
            process.join()


@contextmanager
def _blas_threads(count: int) -> Iterator[None]:
    """NumPy in processes started inside uses `count` threads; its BLAS reads the environment when it is loaded."""
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(BLAS_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name in BLAS_VARIABLES:
            del os.environ[name]
        os.environ.update(before)


def _work(
    pipe: Connection, subject: ModelUnderTest, n_ctx: int, folder: Path, threads: int, unit: Unit
) -> None:
    """A worker: items in, (result, None) or (None, error) out, until the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which kills its workers
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            with open_engine(subject, n_ctx, folder, threads) as backend:
                while True:
                    pipe.send((unit(backend, pipe.recv()), None))
        except EdgeKVError as error:
            pipe.send((None, error))


def _send(pipe: Connection, process: BaseProcess, item: Any) -> None:
    try:
        pipe.send(item)
    except (BrokenPipeError, ConnectionResetError):
        _receive(pipe, process)  # raises what it left with


def _receive(pipe: Connection, process: BaseProcess) -> Any:
    try:
        result, error = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        cause = cause_of_death("a worker", process.exitcode or 0, "take fewer --jobs")
        raise BackendError(f"{cause}. What is done is kept: run again to go on") from None
    if error is not None:
        raise error
    return result
