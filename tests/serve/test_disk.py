"""What the cache lets go of, on disk: found again, within its bytes, and never wrong."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekv.backends.open import model_identity, open_sequences
from edgekv.backends.sequences import Piece, Sequences
from edgekv.errors import InputError
from edgekv.serve.engine import disk as module
from edgekv.serve.engine.blocks import block_hashes
from edgekv.serve.engine.disk import MIN_TOKENS, Disk
from edgekv.serve.engine.prefixes import Prefixes
from edgekv.source import Array

ATOL = 0.03  # of logits up to 15, by rounding: tests/backends/test_sequences.py


@pytest.fixture(scope="module")
def engine(tiny_mla: Path) -> Iterator[Sequences]:
    opened = open_sequences(tiny_mla, n_parallel=1, n_ctx=512, cache_type="q8_0", n_threads=1)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def empty(engine: Sequences) -> None:
    for sequence in range(engine.n_sequences):
        engine.trim(sequence, 0)


def text(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, length)]


class Server:
    """Prefixes over a disk, which closes as a process that ends."""

    def __init__(self, engine: Sequences, model: Path, folder: Path, n_bytes: int = 10**8) -> None:
        self.engine = engine
        for sequence in range(engine.n_sequences):
            engine.trim(sequence, 0)
        self.disk = Disk(folder, n_bytes, model_identity(model), engine.layout())
        self.prefixes = Prefixes(engine, self.disk)

    def ask(self, prompt: Sequence[int]) -> tuple[int, Array]:
        """How many tokens were there, and the logits after the last."""
        rows = self.prefixes.begin(prompt, block_hashes(prompt))
        reused = len(rows.tokens)
        self.prefixes.make_room(len(prompt) - reused)
        (logits,) = self.engine.run([Piece(rows.sequence, reused, prompt[reused:], logits=True)])
        self.prefixes.appended(rows, prompt[reused:])
        self.prefixes.finish(rows)
        return reused, logits

    def stop(self) -> None:
        self.prefixes.save_all()
        self.kill()

    def kill(self) -> None:
        self.disk._held.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_what_is_let_go_comes_back_also_after_a_restart(
    engine: Sequences, tiny_mla: Path, tmp_path: Path
) -> None:
    server = Server(engine, tiny_mla, tmp_path / "made")
    prompts = [text(seed, 400) for seed in range(3)]
    expected = [server.ask(prompt)[1] for prompt in prompts]  # 512 cells: each drives the one before it out
    assert len(files(tmp_path / "made")) == 2
    reused, logits = server.ask(prompts[0])
    assert reused == 399
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=ATOL)
    server.stop()
    server = Server(engine, tiny_mla, tmp_path / "made")
    for prompt, row in zip(prompts, expected, strict=True):
        reused, logits = server.ask([*prompt])
        assert reused == 399
        np.testing.assert_allclose(logits, row, rtol=0, atol=ATOL)
    assert server.disk.n_restored == 3 * 399
    assert server.ask(prompts[1][:300] + text(9, 50))[0] == 300
    server.kill()


def test_a_conversation_is_appended_and_a_short_turn_is_not_written(
    engine: Sequences, tiny_mla: Path, tmp_path: Path
) -> None:
    server = Server(engine, tiny_mla, tmp_path)
    talk = text(1, 490)
    server.ask(talk[:200])
    assert server.prefixes.save_one()
    assert not server.prefixes.save_one()
    (path,) = files(tmp_path)
    before = path.read_bytes()
    server.ask(talk[: 200 + MIN_TOKENS - 1])
    server.prefixes.save_all()
    assert path.read_bytes() == before
    server.ask(talk)
    server.stop()
    assert files(tmp_path) == [path]
    assert path.read_bytes()[: len(before)] == before
    assert server.disk.used == path.stat().st_size
    server = Server(engine, tiny_mla, tmp_path)
    assert server.ask(talk)[0] == 489
    server.kill()


def test_the_bytes_are_a_promise(engine: Sequences, tiny_mla: Path, tmp_path: Path) -> None:
    one = Server(engine, tiny_mla, tmp_path / "one")
    one.ask(text(0, 400))
    one.stop()
    size = one.disk.used
    n_bytes = 2 * size + size // 2
    server = Server(engine, tiny_mla, tmp_path / "few", n_bytes)
    for seed in range(6):
        server.ask(text(seed, 400))
        assert sum(path.stat().st_size for path in files(tmp_path / "few")) == server.disk.used <= n_bytes
    server.stop()
    assert len(files(tmp_path / "few")) == 2
    server = Server(engine, tiny_mla, tmp_path / "few", size + 10)  # fewer than there are
    assert server.disk.used <= size + 10
    assert [server.ask(text(seed, 400))[0] for seed in (5, 4)] == [399, 0]
    server.kill()
    server = Server(engine, tiny_mla, tmp_path / "few", 1000)
    server.ask(text(1, 400))
    server.stop()
    assert files(tmp_path / "few") == []


@pytest.mark.parametrize("damage", ["flip", "header", "gone", "torn", "other"])
def test_damaged_files_are_left_aside(engine: Sequences, tiny_mla: Path, tmp_path: Path, damage: str) -> None:
    server = Server(engine, tiny_mla, tmp_path)
    prompt = text(1, 400)
    _, expected = server.ask(prompt)
    server.stop()
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "header":
        data[40] ^= 1
    elif damage == "torn":  # a save that was cut off: the one before it counts
        last = data.rindex(b"EKVB")
        data += data[last : last + 33]
    path.write_bytes(b"something else" if damage == "other" else data)
    server = Server(engine, tiny_mla, tmp_path)
    if damage == "gone":
        path.unlink()
    reused, logits = server.ask(prompt)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)
    assert reused == (399 if damage == "torn" else 0)
    assert server.disk.n_damaged == (damage != "torn")
    assert damage == "torn" or not path.exists()
    assert [each.suffix for each in files(tmp_path)] == {"gone": [], "torn": [".prefix"]}.get(
        damage, [".damaged"]
    )
    server.stop()
    server = Server(engine, tiny_mla, tmp_path)
    assert server.ask(prompt)[0] == 399  # written anew
    assert server.disk.n_damaged == 0
    server.kill()


def test_a_full_disk_is_survived(
    engine: Sequences, tiny_mla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(engine, tiny_mla, tmp_path)
    server.ask(text(0, 200))
    server.prefixes.save_all()
    before = {path: path.read_bytes() for path in files(tmp_path)}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        server.ask(text(0, 400))  # would be appended
        server.ask(text(1, 400))
        assert server.disk.n_errors == 1  # then it writes nothing for a while
        patch.setattr(module, "PAUSE_S", 0.0)
        server.disk._paused_until = 0.0
        server.ask(text(2, 400))
        assert server.disk.n_errors == 2
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    server.disk._paused_until = 0.0
    server.ask(text(3, 400))
    server.stop()
    assert len(files(tmp_path)) == 3
    assert server.disk.used == sum(path.stat().st_size for path in files(tmp_path))


def test_what_another_server_or_model_has(
    engine: Sequences, tiny_mla: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    server = Server(engine, tiny_mla, tmp_path)
    server.ask(text(1, 400))
    with pytest.raises(InputError, match="another server keeps its sessions in"):
        Disk(tmp_path, 10**8, model_identity(tiny_mla), engine.layout())
    server.stop()
    other = Disk(tmp_path, 10**8, model_identity(tiny_llama), engine.layout())
    assert other.used == server.disk.used
    assert other.find(text(1, 400), block_hashes(text(1, 400)), 0) == (None, 0)
    other._held.close()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be kept in .*file: "):
        Disk(tmp_path / "file", 10**8, model_identity(tiny_mla), engine.layout())
