"""Standard streams that are closed, full, or of another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EDGEKV = str(Path(sys.executable).parent / "edgekv")

Result = subprocess.CompletedProcess[str]
SHORT = ("-p", "hello", "-n", "8", "--temp", "0", "-t", "1", "--no-template")


def shell(redirect: str, *args: object, **options: object) -> Result:
    """Runs the command with a redirection of the shell."""
    command = ["sh", "-c", f'exec "$0" "$@" {redirect}', EDGEKV, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("encoding", ["latin-1", "cp437"])
def test_letters_that_a_terminal_lacks(encoding: str, tiny_llama: Path) -> None:
    """A random model writes bytes that are no text, each of them U+FFFD."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    with_words = subprocess.run(
        [EDGEKV, "chat", tiny_llama, *SHORT], capture_output=True, timeout=120, env=environment
    )
    assert (with_words.returncode, with_words.stderr) == (0, b"")
    reports = [
        json.loads(
            subprocess.run(
                [EDGEKV, "chat", tiny_llama, *SHORT, "--json"],
                capture_output=True,
                timeout=120,
                check=True,
                env=os.environ | {"PYTHONIOENCODING": name},
            ).stdout.decode(name)
        )
        for name in (encoding, "utf-8")
    ]
    assert reports[0]["text"] == reports[1]["text"]
    assert "\N{REPLACEMENT CHARACTER}" in reports[0]["text"]
    assert "?" in with_words.stdout.decode(encoding)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_started_with_closed_streams(closed: str, tiny_llama: Path) -> None:
    """As supervisors do; the model's process gets descriptors that are not those of its streams."""
    result = shell(closed, "chat", tiny_llama, *SHORT)
    assert (result.returncode, result.stderr) == (0, "")
    assert bool(result.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_no_input_at_all_is_an_empty_question(tiny_llama: Path) -> None:
    result = shell("<&-", "chat", tiny_llama)
    assert result.returncode == 2
    assert result.stderr.startswith("edgekv: error: the question is empty")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "args",
    [("--help",), ("inspect", "MODEL", "--json"), ("inspect", "MODEL"), ("chat", "MODEL", *SHORT)],
    ids=" ".join,
)
def test_a_full_disk_behind_standard_output(args: tuple[str, ...], tiny_llama: Path) -> None:
    args = tuple(str(tiny_llama) if arg == "MODEL" else arg for arg in args)
    result = shell(">/dev/full", *args)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("edgekv: error: standard output cannot be written: No space left on device; ")
    assert shell(">/dev/full 2>&1", *args).returncode == 2


def test_a_pipe_that_is_closed_early_is_no_error(tiny_llama: Path) -> None:
    process = subprocess.Popen(
        [EDGEKV, "inspect", tiny_llama], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() in (0, 1)


def test_without_a_place_for_temporary_files(tiny_llama: Path) -> None:
    """A container with a read-only root: chat writes none."""
    blocked = (
        "import sys, tempfile; tempfile.tempdir = '/nonexistent'; from edgekv.cli.main import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked, "chat", str(tiny_llama), *SHORT],
        capture_output=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, b"")
