"""The `edgekv` command: quick, documented, and honest in its exit codes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from edgekv.cli.export import FORMATS
from edgekv.cli.main import COMMANDS, ELSEWHERE, cli
from edgekv.errors import EdgeKVError

Result = subprocess.CompletedProcess[str]


def test_help_names_every_command_without_importing_it(edgekv: Callable[..., Result]) -> None:
    result = edgekv("--help")
    assert result.returncode == 0
    shown = " ".join(result.stdout.split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in shown


def test_help_is_quick() -> None:
    """Processor time of the best of three, less what Python itself takes to start: the bar is 0.2 s."""
    script = "import resource, sys; sys.argv = ['edgekv', '--help']\n{}\n"
    times = {}
    for name, body in {
        "bare": "pass",
        "help": "from edgekv.cli.main import main\ntry: main()\nexcept SystemExit: pass",
    }.items():
        code = script.format(body) + "u = resource.getrusage(resource.RUSAGE_SELF)\n"
        code += "print(u.ru_utime + u.ru_stime, file=sys.stderr)"
        runs = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(3)
        ]
        times[name] = min(float(run.stderr) for run in runs)
    assert times["help"] - times["bare"] < 0.2


@pytest.mark.parametrize("what", ["edgekv", *COMMANDS])
def test_help_imports_nothing_heavy(what: str) -> None:
    arguments = ["edgekv", *([] if what == "edgekv" else [what]), "--help"]
    code = f"import sys\nfrom edgekv.cli.main import main\nsys.argv = {arguments}\n"
    code += "try: main()\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split())
    assert "click" in loaded
    assert not loaded & {"numpy", "gguf", "torch", "llama_cpp", "onnxruntime", "rich", "jinja2", "tokenizers"}
    assert not loaded & {"huggingface_hub", "socket", "ssl"}  # nor anything that could ask a network


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_example(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    text = command.get_help(click.Context(command, info_name=f"edgekv {name}"))
    assert f"\n  edgekv {name} " in text, "an example"
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert undocumented == []


def test_every_command_module_is_listed() -> None:
    folder = Path(importlib.import_module("edgekv.cli").__file__ or "").parent
    declares = re.compile(r"^@options\.command\(", re.MULTILINE)

    def declared(place: Path) -> set[str]:
        return {p.stem for p in place.glob("*.py") if declares.search(p.read_text(encoding="utf-8"))}

    assert declared(folder) == {*COMMANDS} - {"export", *ELSEWHERE}
    assert declared(folder / "hub") | declared(folder / "talk") == {*ELSEWHERE}
    assert declared(folder / "export") == {*FORMATS}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["convert", "m.gguf", "-o", "x.gguf", "--calib", "t.txt"], "--text"),
        (["heal", "m.gguf", "-o", "x", "--cache", "q4_0"], "--cache-type"),
        (["bench", "m.gguf", "--context", "512"], "--ctx-size"),
        (["export", "safetensors", "m.gguf", "-o", "x", "--dtype", "float32"], "--weights"),
    ],
)
def test_an_old_spelling_names_the_new_one(
    edgekv: Callable[..., Result], arguments: list[str], name: str
) -> None:
    result = edgekv(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].endswith(f"it is {name}")


def test_what_it_does_not_know(edgekv: Callable[..., Result]) -> None:
    result = edgekv("enlarge")
    assert (result.returncode, result.stdout) == (2, "")
    assert "enlarge" in result.stderr
    assert edgekv("inspect").returncode == 2
    assert edgekv("inspect", "x.gguf", "--nonsense").returncode == 2


def test_version(edgekv: Callable[..., Result]) -> None:
    from edgekv import __version__

    assert edgekv("--version").stdout.split()[-1] == __version__


def test_python_dash_m(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "edgekv", "inspect", str(tmp_path / "none.gguf")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "no such file" in result.stderr


def children(kind: type[EdgeKVError]) -> list[type[EdgeKVError]]:
    return [kind] + [grandchild for child in kind.__subclasses__() for grandchild in children(child)]


@pytest.mark.parametrize("kind", children(EdgeKVError))
def test_every_error_is_a_line_and_an_exit_code(
    kind: type[EdgeKVError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgekv.cli.main import main

    @click.command("boom")
    def boom() -> None:
        raise kind("what happened; what to do")

    monkeypatch.setattr(type(cli), "get_command", lambda self, ctx, name: boom)
    monkeypatch.setattr(sys, "argv", ["edgekv", "boom"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == kind.exit_code
    assert kind.exit_code in (1, 2, 3)
    assert capsys.readouterr().err == "edgekv: error: what happened; what to do\n"


def test_a_path_that_cannot_be_looked_at_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    name = "x" * 300
    for command in (
        ["inspect", name],
        ["chat", name, "-p", "hi"],
        ["compare", name],
        ["eval", name, "--text", name],
        ["plan", name, "--board", "pi-5"],
        ["export", "gguf", name, "-o", "out.gguf"],
        ["export", "gguf", tmp_path, "-o", name],
        ["sweep", name],
    ):
        assert "File name too long" in refused(*command, cwd=tmp_path)
