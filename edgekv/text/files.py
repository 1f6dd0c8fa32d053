"""Text files, plain or packed (.xz), whole or one document at a time, with one set of errors.

In UTF-8, or in UTF-16 with a byte order mark, as PowerShell's `>` writes it. `option` is what the user typed the path
behind, such as "--text": errors name it. A byte order mark is no part of a text.
"""

from __future__ import annotations

import hashlib
import lzma
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, cast

from edgekv.errors import InputError

DOCUMENT_BREAK = "\n\n\n"
READ_CHARS = 1 << 20


def read_text(path: Path, option: str = "") -> str:
    r"""A whole text; \r\n and \r become \n.

    Raises:
        InputError: the file cannot be read, is damaged, is not UTF-8 or is empty.
    """
    return read_hashed_text(path, option)[0].replace("\r\n", "\n").replace("\r", "\n")


def read_hashed_text(path: Path, option: str = "") -> tuple[str, str]:
    """A whole text with its line ends as they are, and the SHA-256 of the file's bytes; raises as `read_text`."""
    with _input_errors(path, option):
        data = path.read_bytes()
        text = decoded(lzma.decompress(data) if path.suffix == ".xz" else data)
    if not text:
        raise InputError(f"{option} {path} is empty; give a file with text in it".lstrip())
    return text, hashlib.sha256(data).hexdigest()


def decoded(data: bytes) -> str:
    """Text without its byte order mark; UnicodeDecodeError if it is neither UTF-8 nor UTF-16."""
    return data.decode(_encoding(data))


def _encoding(start: bytes) -> str:
    """The encoding that the first bytes of a text tell."""
    return "utf-16" if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"


def documents(path: Path, option: str = "") -> Iterator[str]:
    """The documents of a text, three newlines between them, one at a time; blank ones are left out.

    Raises:
        InputError: the file cannot be read, is damaged, is not UTF-8 or holds no document.
    """
    found = False
    with _input_errors(path, option), _opened(path) as file:
        rest = ""
        while piece := file.read(READ_CHARS):
            *whole, rest = (rest + piece).split(DOCUMENT_BREAK)
            for text in filter(str.strip, whole):
                found = True
                yield text
        if rest.strip():
            yield rest
        elif not found:
            raise InputError(f"{option} {path} is empty; give a file with text in it".lstrip())


def _opened(path: Path) -> IO[str]:
    file = cast("BufferedReader", (lzma.open if path.suffix == ".xz" else open)(path, "rb"))
    return TextIOWrapper(file, encoding=_encoding(file.peek(2)), newline="\n")


@contextmanager
def _input_errors(path: Path, option: str) -> Iterator[None]:
    """What goes wrong while a file is read, as an InputError that says what to do."""
    name = f"{option} {path}".lstrip()
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not text in UTF-8 or UTF-16 ({error}); convert it, e.g. with iconv"
        ) from error
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{name} is damaged: {error}; fetch it again") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}; check the path") from error
