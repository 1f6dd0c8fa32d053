"""The isolated backend: the same numbers as in-process, and a dead child that is survived."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekv.backends.base import Interrupted
from edgekv.backends.isolated.backend import IsolatedBackend
from edgekv.backends.isolated.shared_logits import MAX_ROWS
from edgekv.backends.open import open_backend
from edgekv.errors import BackendError, InputError, ModelFileError
from edgekv.models.gguf.header import read_header
from edgekv.tokenizer.tokenizer import Tokenizer

TEXT = [1, 4093, 198, 504, 2120, 282, 253, 1165, 2391, 3542, 314, 1343, 28, 284, 357, 314, 6104, 30]


@pytest.fixture(scope="module")
def shared_backend(smollm2: Path) -> Iterator[IsolatedBackend]:
    backend = IsolatedBackend(smollm2, n_ctx=2048, n_threads=1)
    yield backend
    backend.close()


@pytest.fixture
def backend(shared_backend: IsolatedBackend) -> IsolatedBackend:
    if not shared_backend.alive:
        shared_backend.restart()
    shared_backend.trim(0)
    return shared_backend


def test_equals_the_same_engine_in_process(smollm2: Path, backend: IsolatedBackend) -> None:
    inside = open_backend(smollm2, n_ctx=2048, n_threads=1)
    assert (backend.name, backend.n_ctx, backend.n_vocab) == (inside.name, inside.n_ctx, inside.n_vocab)
    assert backend.cache_nbytes() == inside.cache_nbytes()
    np.testing.assert_array_equal(backend.prefill(TEXT), inside.prefill(TEXT))
    np.testing.assert_array_equal(backend.decode(28), inside.decode(28))
    assert backend.n_past == inside.n_past == len(TEXT) + 1
    long = (TEXT * 8)[: MAX_ROWS + 3]
    np.testing.assert_array_equal(backend.prefill_all(long), inside.prefill_all(long))
    backend.trim(5)
    inside.trim(5)
    np.testing.assert_array_equal(backend.decode(3), inside.decode(3))
    inside.close()


def test_errors_cross_the_pipe_with_their_class(backend: IsolatedBackend, tmp_path: Path) -> None:
    backend.prefill(TEXT)
    with pytest.raises(BackendError, match="do not fit"):
        backend.prefill(TEXT * 200)
    assert backend.n_past == len(TEXT)
    (tmp_path / "bad.gguf").write_bytes(b"junk")
    with pytest.raises(ModelFileError):
        IsolatedBackend(tmp_path / "bad.gguf")
    with pytest.raises(InputError, match="unknown backend"):
        IsolatedBackend(tmp_path / "bad.gguf", kind="tensorrt")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_child_is_an_error_and_restart_brings_it_back(
    backend: IsolatedBackend, number: signal.Signals
) -> None:
    expected = backend.prefill(TEXT)
    os.kill(backend.pid, number)
    with pytest.raises(BackendError, match=f"process died: killed by {number.name}"):
        backend.decode(5)
    assert not backend.alive
    with pytest.raises(BackendError, match=number.name):
        backend.decode(5)
    backend.restart()
    assert backend.n_past == 0
    np.testing.assert_array_equal(backend.prefill(TEXT), expected)


def test_a_child_killed_in_the_middle_of_a_call(backend: IsolatedBackend) -> None:
    threading.Timer(0.2, os.kill, (backend.pid, signal.SIGKILL)).start()
    with pytest.raises(BackendError, match="SIGKILL"):
        backend.prefill((TEXT * 120)[:2000])


def test_interrupt_ends_the_call_and_nothing_else(backend: IsolatedBackend) -> None:
    backend.interrupt()  # between calls it does nothing
    first = backend.prefill(TEXT)
    threading.Timer(0.3, backend.interrupt).start()
    started = time.perf_counter()
    with pytest.raises(Interrupted):
        backend.prefill((TEXT * 120)[:2000])
    assert time.perf_counter() - started < 5
    backend.trim(0)
    np.testing.assert_array_equal(backend.prefill(TEXT), first)


def test_close_ends_the_child(smollm2: Path) -> None:
    backend = IsolatedBackend(smollm2, n_ctx=256)
    pid = backend.pid
    assert (backend.peak_rss_nbytes() or 0) > 50e6
    backend.close()
    backend.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(BackendError, match="closed"):
        backend.decode(1)


def test_the_childs_vocabulary_is_the_files(smollm2: Path, backend: IsolatedBackend) -> None:
    ours, theirs = Tokenizer.from_metadata(read_header(smollm2).metadata), backend.language()
    for name in ("chat_template", "bos_id", "eos_id", "stop_ids"):
        assert getattr(theirs, name) == getattr(ours, name)
    some = [*range(0, len(ours), 97), *ours.stop_ids]
    assert [theirs.token_bytes(i) for i in some] == [ours.token_bytes(i) for i in some]
    assert [theirs.is_control(i) for i in some] == [ours.is_control(i) for i in some]
    for text in ("", "A <|im_end|> b\n", "naïve 🙂\ud800\0", "word " * 3000):
        for parse in (False, True):
            assert theirs.encode(text, True, parse) == ours.encode(text, True, parse)
    with pytest.raises(IndexError):
        theirs.token_bytes(len(ours))


def test_an_engine_without_a_vocabulary_of_its_own_reads_the_files(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_metadata(read_header(smollm2).metadata)
    engine = IsolatedBackend(smollm2, "reference", n_ctx=8)
    assert engine.language().encode("one two", parse_special=True) == tokenizer.encode("one two")
    engine.close()
