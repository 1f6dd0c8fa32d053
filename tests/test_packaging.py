"""The shape of the repository: what is packaged, who may import whom, how long a file may be."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = {
    "edgekv": ROOT / "edgekv",
    **{f"edgekv.{room}": ROOT / room for room in ("quant", "export", "devices")},
}

# Lower levels never import higher ones; a room counts as a whole.
LEVELS = (
    ("errors", "quant", "spec", "progress"),
    ("documents", "source", "tensors", "files", "host", "tokenizer"),
    ("cache", "models", "route"),
    ("reference",),
    ("rewrite", "backends"),
    ("text", "convert", "chat"),
    ("export", "heal", "devices", "serve"),
    ("evaluate",),
    ("workflows",),
    ("cli",),
)
MAX_LOOSE, MAX_IN_FOLDER = 7, 16  # modules at the top of edgekv/, and in any other folder
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# Heavy or optional libraries, and the only places that may import them.
HOMES = {
    "click": ("edgekv/cli/",),
    "huggingface_hub": ("edgekv/models/hub/",),
    "llama_cpp": ("edgekv/backends/",),
    "onnxruntime": ("edgekv/backends/",),
    "onnx": ("export/onnx/",),
    "onnx_ir": ("export/onnx/",),
    "matplotlib": ("edgekv/evaluate/", "devices/reporting/"),
    "pynvml": ("devices/sensors/",),
    "torch": ("edgekv/heal/",),
    "transformers": (),
    "llguidance": ("edgekv/serve/",),
    "httpx": ("edgekv/serve/peers/",),
    "starlette": ("edgekv/serve/",),
    "uvicorn": ("edgekv/serve/",),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module that ships: its dotted name and its file."""
    for package, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


MODULES = dict(modules())


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, and whether only a type checker sees them."""
    tree = parsed(path)
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module, id(node) in typing_only
            yield from ((f"{node.module}.{alias.name}", id(node) in typing_only) for alias in node.names)


def room_of(module: str) -> str | None:
    """The part of edgekv that a dotted name belongs to; None outside of edgekv and for edgekv itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "edgekv" and len(parts) > 1 and not parts[1].startswith("_") else None


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert found == set(settings["packages"])
    assert {name: ROOT / folder for name, folder in settings["package-dir"].items()} == ROOMS


def test_every_folder_of_modules_is_a_package() -> None:
    for path in MODULES.values():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} would not be packaged"


def test_data_files_are_packaged() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    for package, folder in ROOMS.items():
        inside = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        inside -= set((folder / "reports").glob("*"))  # figures to read here, not to install
        listed = {
            p
            for name, globs in data.items()
            if name == package or (name.startswith(f"{package}.") and ROOMS.keys().isdisjoint({name}))
            for glob in globs
            for p in folder.joinpath(*name.removeprefix(package).split(".")[1:]).glob(glob)
        }
        assert inside == listed


def graph() -> dict[str, set[str]]:
    """Modules by name, and which modules each one imports when it runs."""
    found = {}
    for module, path in MODULES.items():
        names = {name for name, typing_only in imports(path) if not typing_only}
        found[module] = {name for name in names if name in MODULES and name != module}
    return found


def test_no_import_circle_between_files() -> None:
    """graphlib names the circle that it finds."""
    tuple(graphlib.TopologicalSorter(graph()).static_order())


def test_folders_are_small() -> None:
    counts = Counter(path.parent for path in MODULES.values() if not path.name.startswith("__"))
    assert counts.pop(ROOT / "edgekv") <= MAX_LOOSE
    assert {str(folder): n for folder, n in counts.items() if n > MAX_IN_FOLDER} == {}


def test_imports_go_down_only() -> None:
    rooms = {module: room for module in MODULES if (room := room_of(module))}
    assert set(rooms.values()) == set(LEVEL_OF), "give every room a level in this test"
    wrong = []
    for module, room in rooms.items():
        for imported, typing_only in imports(MODULES[module]):
            target = room_of(imported)
            if target not in (None, room) and not typing_only and LEVEL_OF[target] > LEVEL_OF[room]:
                wrong.append(f"{module} imports {imported}, which is above it")
    assert wrong == []


def test_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path in MODULES.values():
        place = path.relative_to(ROOT).as_posix()
        for imported, typing_only in imports(path):
            homes = HOMES.get(imported.split(".")[0])
            if homes is not None and not typing_only and not place.startswith(homes):
                wrong.append(f"{place} imports {imported}")
    assert wrong == []


def test_only_the_command_line_prints() -> None:
    printing = []
    for module, path in MODULES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                elsewhere = any(keyword.arg == "file" for keyword in node.keywords)  # to another process
                printing += [] if elsewhere or room_of(module) == "cli" else [f"{module}:{node.lineno}"]
    assert printing == []


def test_files_are_short() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_paths_in_printed_commands_are_quoted() -> None:
    """A command with a value in it, such as a path with a space, can be pasted into a shell."""
    command = re.compile(r"(edgekv (?:\w+ )+|mkdir -p )\{(?!shlex\.|command)")
    given = {"edgekv convert {entry.convert": "a user's own words"}
    found = []
    for path in MODULES.values():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}"  # type: ignore[attr-defined]
                    for part in node.values
                )
                found += [
                    (path.name, text) for _ in command.findall(text) if not any(g in text for g in given)
                ]
    assert found == []
