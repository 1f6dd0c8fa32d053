"""Shards of training text: tokenized once into a cache, cut into sequences, drawn in a fixed order."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from edgekv.errors import InputError, ModelFileError
from edgekv.files import atomic_path, file_sha256
from edgekv.progress import Progress
from edgekv.source import TensorSource
from edgekv.spec import Metadata
from edgekv.text.files import documents

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Encode = Callable[[str], list[int]]

BREAK_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Shard:
    """One tokenized text: where it came from, so that a record can name its data."""

    name: str
    sha256: str
    tokens: Tokens


def break_token(metadata: Metadata) -> int:
    """The token between two documents: the one models were pretrained with, by its usual names, or EOS.

    Raises:
        ModelFileError: the model has neither.
    """
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    if isinstance(vocabulary, list):
        for text in BREAK_TOKENS:
            if text in vocabulary:
                return vocabulary.index(text)  # type: ignore[arg-type]  # a list of strings
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if not isinstance(eos, int):
        raise ModelFileError(
            "the model names no end-of-text token (tokenizer.ggml.eos_token_id); export it with its tokenizer"
        )
    return eos


def tokenize(texts: Iterator[str], encode: Encode, between: int, progress: Progress) -> Iterator[list[int]]:
    """Ids of each document, with `between` after it."""
    done = 0
    for text in texts:
        yield [*encode(text), between]
        done += len(text)
        progress(done, 0)


def load_shard(
    path: Path, source: TensorSource, encode: Encode, progress: Progress, option: str = "--text"
) -> Shard:
    """The tokens of a text, or of a token file (.npy or .npy.xz: one row of uint16 or uint32).

    A text is tokenized once: the tokens stay in the cache folder, under a name made of the text's and the
    vocabulary's hashes.

    Args:
        option: what the user typed the path behind; errors name it.

    Raises:
        InputError: the file cannot be read, or holds tokens that the model does not have.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; {option} takes .txt, .txt.xz, .npy or .npy.xz files")
    digest = file_sha256(path)
    if path.name.endswith((".npy", ".npy.xz")):
        return Shard(path.name, digest, _read_tokens(path, source.spec.vocab))
    cached = cache_folder() / f"{digest[:24]}-{_vocabulary_key(source)}.npy"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        ids = tokenize(documents(path, option), encode, break_token(source.metadata), progress)
        write_tokens(cached, ids, source.spec.vocab)
    return Shard(path.name, digest, _read_tokens(cached, source.spec.vocab))


def write_tokens(path: Path, ids: Iterator[list[int]], n_vocab: int) -> None:
    """Write documents' ids one after the other as one .npy row, in the smallest unsigned type."""
    dtype = np.uint16 if n_vocab <= 1 << 16 else np.uint32
    pieces = [np.asarray(document, dtype=dtype) for document in ids]
    with atomic_path(path, force=True) as partial, open(partial, "wb") as file:
        np.save(file, np.concatenate(pieces) if pieces else np.empty(0, dtype))


def _read_tokens(path: Path, n_vocab: int) -> Tokens:
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                tokens: Tokens = np.load(file, allow_pickle=False)
        else:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{path} is not a token file ({error}); give a .npy file of token ids") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise InputError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}, not one row of uint16 or uint32; "
            "save the token ids as one"
        )
    if tokens.size and (top := int(tokens.max())) >= n_vocab:
        raise InputError(
            f"{path} holds token {top}, the model has {n_vocab}: it was made for another model; "
            "tokenize the text with this one"
        )
    return tokens


def cache_folder() -> Path:
    """Where tokenized texts are kept."""
    return user_cache_path("edgekv") / "tokens"


def _vocabulary_key(source: TensorSource) -> str:
    digest = hashlib.sha256()
    for key in ("model", "pre", "tokens", "merges"):
        digest.update(repr(source.metadata.get(f"tokenizer.ggml.{key}")).encode())
    return digest.hexdigest()[:16]


class TokenStream:
    """Sequences of all shards in an order that the seed fixes; batch `step` depends on nothing else.

    Every sequence is seen once before any is seen again. The last `held_out` sequences of the last shard
    are kept for evaluation.

    Raises:
        InputError: there is less text than one batch.
    """

    def __init__(
        self, shards: Sequence[Shard], seq_len: int, batch: int, seed: int, held_out: int = 0
    ) -> None:
        self.seq_len, self.batch, self.seed = seq_len, batch, seed
        whole = [shard.tokens[: len(shard.tokens) // seq_len * seq_len] for shard in shards]
        rows = [tokens.reshape(-1, seq_len) for tokens in whole]
        self.held_out = rows[-1][len(rows[-1]) - held_out :].astype(np.int64)
        rows[-1] = rows[-1][: len(rows[-1]) - held_out]
        self._rows = rows
        self._starts = np.cumsum([0] + [len(r) for r in rows])
        self.n_sequences = int(self._starts[-1])
        if self.n_sequences < batch:
            raise InputError(
                f"the text gives {self.n_sequences} sequences of {seq_len} tokens, one step takes {batch}; "
                "give more text, or a smaller --batch-tokens or --seq-len"
            )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def tokens(self, step: int) -> NDArray[np.int64]:
        """The batch of a step, (batch, seq_len)."""
        picks = [self._pick(number) for number in range(step * self.batch, (step + 1) * self.batch)]
        return np.stack([self._row(index) for index in picks])

    def _pick(self, number: int) -> int:
        epoch, place = divmod(number, self.n_sequences)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.n_sequences)
            self._epoch = epoch
        return int(self._order[place])

    def _row(self, index: int) -> NDArray[np.int64]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        row: NDArray[np.int64] = self._rows[shard][index - self._starts[shard]].astype(np.int64)
        return row
