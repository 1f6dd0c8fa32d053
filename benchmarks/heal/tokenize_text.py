"""Tokens of a healing corpus, some of its documents set in another typography: python tokenize_text.py --help

WikiText-2 test is set as that corpus's tokenizer left it: spaces around punctuation, " @-@ " for hyphens,
" = Heading = ". A student healed on clean text alone loses more on such text than on its own kind, as it would
on any other unusual setting. So a share of the documents is set that way here, drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from pathlib import Path

import numpy as np

from edgekv.models.open import open_model
from edgekv.text.files import documents
from edgekv.text.shards import break_token
from edgekv.tokenizer.tokenizer import Tokenizer

SEED = 0
tokenizer: Tokenizer
end: int


def spaced(document: str) -> str:
    """A document in the typography of WikiText: its first line a heading, punctuation apart."""
    lines = [line.strip() for line in document.strip().split("\n")]
    out = []
    for i, line in enumerate(lines):
        if not line:
            continue
        heading = (i == 0 and len(line) < 80) or (
            len(line) < 60 and line.endswith(".") and line.count(" ") < 6
        )
        if heading:
            mark = "=" if i == 0 else "= ="
            out.append(f" \n {mark} {_apart(line.rstrip('.'))} {mark} \n")
        else:
            out.append(f" {_apart(line)} ")
    return " \n" + "\n".join(out) + "\n"


def _apart(line: str) -> str:
    line = re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", line)
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line)
    line = re.sub(r"(?<!@)([,;:?!()\[\]\"“”%$/–—])(?!@)", r" \1 ", line)
    line = re.sub(r"('s|'t|'re|'ve|'ll|'d|'m)\b", r" \1", line)
    line = re.sub(r"(?<=\w\w)\.(?=\s|$)", " .", line)
    return re.sub(r" {2,}", " ", line).strip()


def encode(document: str) -> np.ndarray:
    """A document's tokens and the token that ends a text."""
    return np.array([*tokenizer.encode(document), end], np.uint16)


def main() -> None:
    global tokenizer, end
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="GGUF whose tokenizer to use")
    parser.add_argument("text", type=Path, help=".txt.xz, documents apart by three newlines")
    parser.add_argument("output", type=Path, help=".npy of uint16 tokens")
    parser.add_argument("--spaced", type=float, default=0.2, help="share of documents to set apart")
    parser.add_argument("--jobs", type=int, default=8)
    options = parser.parse_args()
    metadata = open_model(options.model).metadata
    tokenizer, end = Tokenizer.from_metadata(metadata), break_token(metadata)
    texts = list(documents(options.text))
    chosen = np.random.default_rng(SEED).random(len(texts)) < options.spaced
    texts = [spaced(d) if yes else d for d, yes in zip(texts, chosen, strict=True)]
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        tokens = np.concatenate(pool.map(encode, texts, chunksize=64))
    np.save(options.output, tokens)
    print(f"{len(texts)} documents, {chosen.sum()} set apart, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
