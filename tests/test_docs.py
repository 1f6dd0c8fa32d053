"""Documents: the commands, options, files and figures that they name are there, and their Python runs."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import edgekv
from edgekv.cli.main import cli
from edgekv.workflows.heal import HealRecipe

ROOT = Path(__file__).parent.parent
HISTORY = ("docs/LOG.md",)  # commands and files as they were
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "models/*.md", "benchmarks/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md" and path.relative_to(ROOT).as_posix() not in HISTORY
}
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for room in ("edgekv", "quant", "export", "devices")
    for path in sorted((ROOT / room).rglob("*.py"))
}
FOLDERS = ("edgekv", "quant", "export", "devices", "models", "benchmarks", "docs", "examples", "tests")
PUBLIC = [
    "BackendError",
    "BenchRequest",
    "ChatRequest",
    "CheckPacksRequest",
    "ConvertRequest",
    "EdgeKVError",
    "EvaluateRequest",
    "ExportGGUFRequest",
    "ExportOnnxRequest",
    "ExportSafetensorsRequest",
    "HealRequest",
    "InputError",
    "Measurements",
    "PackRequest",
    "PlanRequest",
    "PullRequest",
    "QuantizeRequest",
    "SweepRequest",
    "VerifyRequest",
    "__version__",
    "bench_models",
    "check_packs",
    "convert_model",
    "evaluate_model",
    "export_model",
    "heal_model",
    "open_chat",
    "open_model",
    "pack_documents",
    "plan_board",
    "pull_model",
    "quantize_model",
    "sweep_models",
    "verify_models",
]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(edgekv, name))]
HEAVY = ("gguf", "huggingface_hub", "llama_cpp", "matplotlib", "numpy", "onnxruntime", "tokenizers", "torch")
IMPORT_CPU_S = 0.15


def walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group by its full name, such as "export onnx"."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for part in command.list_commands(context):
        child = command.get_command(context, part)
        assert child is not None
        yield from walk(child, f"{name} {part}".strip())


COMMANDS = dict(walk(cli, ""))


# Commands and options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_on_the_page_of_its_command(name: str) -> None:
    heading = re.compile(rf"^##? edgekv {name}\b", re.MULTILINE)
    pages = [text for page, text in PAGES.items() if page.startswith("docs/") and heading.search(text)]
    assert len(pages) == 1, f"one page under docs/ has the heading `edgekv {name}`"
    options = [param for param in COMMANDS[name].params if isinstance(param, click.Option)]
    names = [max(option.opts, key=len) for option in options]
    assert [option for option in names if not re.search(rf"{option}(?![\w-])", pages[0])] == []


def blocks(text: str) -> Iterator[str]:
    """Lines of code blocks, fenced or indented, with continued lines joined."""
    fenced, joined = False, ""
    for line in text.splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            joined += line.strip().removesuffix("\\")
            if not line.endswith("\\"):
                yield joined
                joined = ""


def examples(help_text: str) -> Iterator[str]:
    """Lines of a command's help that are commands, without what explains them."""
    for line in help_text.splitlines():
        yield re.split(r"\s{2,}", line.strip())[0]


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of every `edgekv` in a line of shell."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote in a text that is no command
        return
    while words:
        stop = next((i for i, word in enumerate(words) if word in ("|", "&&", ">", ">>", ";")), len(words))
        command, words = words[:stop], words[stop + 1 :]
        if command and command[0].rsplit("/", 1)[-1] == "edgekv":
            yield command[1:]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and what is left of them."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        child = command.get_command(click.Context(command), words[0])
        assert child is not None, f"there is no command {words[0]!r}"
        command, words = child, words[1:]
    return command, words


def check_call(words: list[str]) -> None:
    """It parses; where "..." stands for arguments, they may be missing."""
    command, rest = resolve([word for word in words if word != "..."])
    if isinstance(command, click.Group):
        check_names(words)
        return
    try:
        command.make_context("edgekv", rest)
    except click.exceptions.Exit:  # --help
        return
    except click.MissingParameter:
        assert "..." in words, f"something is missing in {words}"


def check_names(words: list[str]) -> None:
    """The command has every option among the words."""
    command, rest = resolve(words)
    known = {"--help", "-h"} | {name for param in command.params for name in param.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known, words


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_pages_parse(page: str) -> None:
    for line in blocks(PAGES[page]):
        for words in calls(line.removeprefix("$ ")):
            check_call(words)
    for code in re.findall(r"`edgekv ([^`]+)`", PAGES[page]):
        check_names(code.split())


@pytest.mark.parametrize("name", ["", "export", *COMMANDS])
def test_commands_in_help_parse(name: str) -> None:
    command, _ = resolve(name.split())
    for line in examples(command.help or ""):
        for words in calls(line):
            check_call(words)


@pytest.mark.parametrize("file", [file for file in SOURCES if "`edgekv " in SOURCES[file]])
def test_messages_and_docstrings_name_commands_that_are_there(file: str) -> None:
    for code in re.findall(r"`edgekv ([a-z][^`{]*)`", SOURCES[file]):
        check_names(code.split())


# Files, links and rooms


@pytest.mark.parametrize("file", [*PAGES, *SOURCES])
def test_files_that_are_named_exist(file: str) -> None:
    text = (PAGES | SOURCES)[file]
    # llama.cpp, which sources cite, has folders docs and models too
    folders = FOLDERS if file in PAGES else set(FOLDERS) - {"docs", "models"}
    named = re.findall(rf"(?<![\w./~-])(?:{'|'.join(folders)})/[\w./*<>-]+", text)
    for path in {path.rstrip(".") for path in named}:
        if "<" not in path:
            assert any(ROOT.glob(path)), f"{file} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page} links to {target}#{anchor}"


def anchors(text: str) -> set[str]:
    """Headings as GitHub spells them in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_readme() -> None:
    found, new = set(), {"README.md"}
    while new:
        page = new.pop()
        found.add(page)
        links = re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", (ROOT / page).read_text(encoding="utf-8"))
        paths = [((ROOT / page).parent / link).resolve() for link in links]
        new |= {path.relative_to(ROOT.resolve()).as_posix() for path in paths if path.exists()} - found
    assert {page for page in PAGES if page.startswith("docs/")} <= found


def test_the_map_of_rooms_is_that_of_the_folders() -> None:
    section = PAGES["README.md"].split("## The rooms")[1]
    names = re.findall(r"^ {4}( *)([\w]+)/ ", section, re.MULTILINE)
    rooms = [f"edgekv/{name}" if indent else name for indent, name in names]
    inner = [path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("edgekv/*/__init__.py")]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    outer = {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}
    assert sorted(rooms) == sorted([*inner, *outer])


def test_the_order_of_imports_is_the_one_that_is_tested() -> None:
    source = (ROOT / "tests/test_packaging.py").read_text(encoding="utf-8")
    levels = ast.literal_eval(source.split("\nLEVELS = ")[1].split("\n)\n")[0] + ")")
    section = PAGES["CONTRIBUTING.md"].split("## The rooms")[1].split("## ")[0]
    shown = [tuple(line.strip().split(", ")) for line in section.splitlines() if line.startswith("    ")]
    assert shown == list(levels)


# Python


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files that the examples name, small ones."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        shutil.copy(tiny_llama, "model.gguf")
        shutil.copy(tiny_mla, "mla.gguf")
        Path("book.txt").write_text((ROOT / "examples/demo.txt").read_text(encoding="utf-8") * 3)
        question = {"query": "Which is wet?", "choices": ["sea", "sand"], "gold": 0}
        Path("piqa.jsonl").write_text(f"{json.dumps(question)}\n" * 2)
        recipe = HealRecipe(steps=0, batch_tokens=512, seq_len=128)
        edgekv.heal_model(
            edgekv.HealRequest(
                "model.gguf", "begun.safetensors", target=0.5, text=("book.txt",), recipe=recipe
            ),  # type: ignore[arg-type]
            lambda event: None,
        )
        yield folder


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Any) -> Path:
    """A copy of those files, to write beside; the model is on a Hub of this machine too."""
    hub.repos["OWNER/NAME"] = hub.Repo({"model-q4_k_m.gguf": (folder / "model.gguf").read_bytes()})
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code: str, names: dict[str, object], where: str) -> None:
    exec(compile(code, where, "exec"), names)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_python_on_the_readme_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "begun.safetensors").rename("healed.safetensors")
    (block,) = python_blocks(PAGES["README.md"])
    run(block, {}, "README.md")
    assert "->" in capsys.readouterr().out


def test_python_on_its_page_runs(place: Path) -> None:
    names: dict[str, object] = {}
    blocks = python_blocks(PAGES["docs/python.md"])
    assert len(blocks) > len(FUNCTIONS)
    for number, block in enumerate(blocks, 1):
        run(block, names, f"docs/python.md, block {number}")


def test_the_page_has_every_function_and_every_field() -> None:
    sections = re.split(r"^## ", PAGES["docs/python.md"], flags=re.MULTILINE)
    described = {section.split("\n")[0]: section for section in sections}
    for name in FUNCTIONS:
        (request, *_) = inspect.signature(getattr(edgekv, name)).parameters.values()
        for field in getattr(getattr(edgekv, str(request.annotation), None), "__dataclass_fields__", ()):
            assert field == "command" or f"`{field}" in described[name], (name, field)


def test_the_public_names_are_pinned() -> None:
    assert sorted(edgekv.__all__) == PUBLIC
    assert all(getattr(edgekv, name).__doc__ for name in PUBLIC if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        edgekv.shrink  # noqa: B018


def test_import_is_quick() -> None:
    code = "import sys, time; t = time.process_time(); import edgekv; print(time.process_time() - t, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < IMPORT_CPU_S
    assert set(HEAVY).isdisjoint(modules)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_docstring_runs(name: str, place: Path) -> None:
    (place / "begun.safetensors").rename("begun")
    shutil.copy("mla.gguf", "small.gguf")
    doc = inspect.getdoc(getattr(edgekv, name)) or ""
    before_sections = re.split(r"^(?:Args|Returns|Raises):", doc, flags=re.MULTILINE)[0]
    code = "\n".join(line[4:] for line in before_sections.splitlines() if line.startswith("    "))
    assert f"edgekv.{name}(" in code, f"{name} has no example"
    assert "Raises:" in doc
    paths = {word: Path(f"{word}.gguf") for word in ("model", "small", "output")}
    run(code, {"edgekv": edgekv, "folder": Path("folder"), "text": Path("book.txt"), **paths}, name)


# Figures


def rows(text: str) -> dict[tuple[str, str], list[str]]:
    """Rows of tables by model and cache type, without marks."""
    found = {}
    for line in text.splitlines():
        cells = [re.sub(r"[*†‡§]", "", cell).strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) > 3:
            found.setdefault((cells[0], cells[1]), cells[2:])
    return found


def test_losses_on_the_readme_are_those_of_the_benchmarks() -> None:
    measured, shown = rows(PAGES["BENCHMARKS.md"]), rows(PAGES["README.md"])
    losses = {key: cells for key, cells in shown.items() if cells[1].replace(",", "").isdigit()}
    assert len(losses) >= 6
    for key, (megabytes, nbytes, loss) in losses.items():
        per_token, _, kl = measured[key][:3]
        assert nbytes == per_token
        assert megabytes == f"{int(nbytes.replace(',', '')) * 8192 / 1e6:.0f}"
        digits = len(loss.partition(".")[2])
        assert loss == f"{float(kl.split()[0]):.{digits}f}"


def test_other_figures_on_the_readme_stand_in_the_benchmarks() -> None:
    text = re.sub(r"^```.*?^```", "", PAGES["README.md"], flags=re.MULTILINE | re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "    ")))
    shown, measured = (
        set(re.findall(r"(?<![\w-])\d+\.\d+(?![\w+])", text)) for text in (prose, PAGES["BENCHMARKS.md"])
    )
    losses = {cells[2] for cells in rows(PAGES["README.md"]).values() if len(cells) == 3}
    assert shown - losses <= measured
