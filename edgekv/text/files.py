"""Text files: UTF-8, plain or packed (.xz), whole or one document at a time, with one set of errors.

`option` is what the user typed the path behind, such as "--calib": errors name it. A byte order mark is no part of a
text.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgekv.errors import InputError

ENCODING = "utf-8-sig"  # UTF-8 with or without a byte order mark, as Windows writes it
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
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode(ENCODING)
    if not text:
        raise InputError(f"{option} {path} is empty; give a file with text in it".lstrip())
    return text, hashlib.sha256(data).hexdigest()


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
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding=ENCODING, newline="\n")
    return open(path, encoding=ENCODING, newline="\n")


@contextmanager
def _input_errors(path: Path, option: str) -> Iterator[None]:
    """What goes wrong while a file is read, as an InputError that says what to do."""
    name = f"{option} {path}".lstrip()
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text ({error}); convert it, e.g. with iconv") from error
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{name} is damaged: {error}; fetch it again") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}; check the path") from error
