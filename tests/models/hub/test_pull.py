"""huggingface_hub against a Hub on loopback: what comes, what is checked, and what every failure says."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import close_session

from edgekv.errors import InputError, OutputError
from edgekv.models.hf.config import read_spec
from edgekv.models.hub.client import UnreachableError, cached_models
from edgekv.models.hub.pull import pull

GGUF = bytes(range(256)) * 4000  # a megabyte; nothing reads it
NAME = "hf:owner/tiny-GGUF"


@pytest.fixture
def tiny(hub: Any) -> Any:
    """A repository with two GGUFs."""
    hub.repos["owner/tiny-GGUF"] = hub.Repo({"tiny.Q8_0.gguf": GGUF[::-1], "tiny.Q4_K_M.gguf": GGUF})
    return hub.repos["owner/tiny-GGUF"]


def gets(hub: Any) -> list[str]:
    return [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_a_gguf_comes_once(hub: Any, tiny: Any) -> None:
    first = pull(NAME)
    assert first.path.read_bytes() == GGUF
    assert (first.kind, first.nbytes, first.fetched_nbytes) == ("GGUF", len(GGUF), len(GGUF))
    assert first.commit == tiny.commit
    again = pull(NAME)
    assert (again.path, again.fetched_nbytes) == (first.path, 0)
    assert gets(hub) == ["/owner/tiny-GGUF/resolve/main/tiny.Q4_K_M.gguf"]
    assert [model.name for model in cached_models()] == [f"{NAME}:Q4_K_M"]


def test_a_new_commit_is_fetched(hub: Any, tiny: Any) -> None:
    pull(NAME)
    tiny.commit, tiny.files = "d" * 40, {"tiny.Q4_K_M.gguf": GGUF[1:]}
    assert pull(NAME).path.read_bytes() == GGUF[1:]


def test_a_split_gguf_comes_whole(hub: Any) -> None:
    parts = {f"sub/big-Q4_K_M-0000{i}-of-00002.gguf": b"%d" % i * 1000 for i in (1, 2)}
    hub.repos["owner/big"] = hub.Repo(parts)
    pulled = pull("hf:owner/big")
    assert pulled.path.name == "big-Q4_K_M-00001-of-00002.gguf"
    assert pulled.path.with_name("big-Q4_K_M-00002-of-00002.gguf").read_bytes() == b"2" * 1000


def test_a_folder_comes_without_what_nobody_reads(hub: Any) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 99,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": b"x" * 100,
        "README.md": b"hello",
    }
    hub.repos["owner/folder"] = hub.Repo(files)
    pulled = pull("hf:owner/folder")
    assert {path.name for path in pulled.path.iterdir()} == {"config.json", "model.safetensors"}
    assert read_spec(pulled.path).name == "folder"


def test_progress_is_told(hub: Any, tiny: Any) -> None:
    told: list[tuple[str, int]] = []
    tiny.files["tiny.Q4_K_M.gguf"] = GGUF * 20
    pull(NAME, lambda stage: lambda done, total, figures="", /: told.append((stage, done)))
    assert {stage for stage, _ in told} == {
        "downloading tiny.Q4_K_M.gguf (MB)",
        "checking tiny.Q4_K_M.gguf (MB)",
    }
    assert max(done for _, done in told) >= 20


def test_a_cut_connection_goes_on_where_it_broke(hub: Any, tiny: Any, quick: None) -> None:
    tiny.cuts["tiny.Q4_K_M.gguf"] = [300_000, 200_000]
    assert pull(NAME).path.read_bytes() == GGUF
    ranges = [wanted for method, _, wanted in hub.requests if method == "GET" and wanted]
    assert len(ranges) == 2
    assert all(int(re.findall(r"\d+", wanted)[0]) > 100_000 for wanted in ranges)


def test_a_connection_that_is_cut_for_good(hub: Any, tiny: Any, quick: None) -> None:
    tiny.cuts["tiny.Q4_K_M.gguf"] = [0] * 20
    with pytest.raises(
        UnreachableError, match=r"the connection broke for good .*start it again: files that are whole"
    ):
        pull(NAME)
    tiny.cuts.clear()
    assert pull(NAME).path.read_bytes() == GGUF


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_a_wrong_hash_is_refused_and_removed(hub: Any, tiny: Any) -> None:
    tiny.sent["tiny.Q4_K_M.gguf"] = GGUF[:-1] + b"!"
    digest = hashlib.sha256(GGUF).hexdigest()[:12]
    with pytest.raises(
        InputError, match=f"is not what the Hub says .SHA-256 {digest}.*removed, start it again"
    ):
        pull(NAME)
    tiny.sent.clear()
    assert pull(NAME).path.read_bytes() == GGUF


def test_a_file_that_changed_in_the_cache_is_fetched_again(hub: Any, tiny: Any) -> None:
    path = pull(NAME).path
    path.resolve().write_bytes(GGUF[:-1] + b"?")
    with pytest.raises(InputError, match=r"start it again"):
        pull(NAME)
    assert pull(NAME).path.read_bytes() == GGUF


def test_a_damaged_small_file_is_noticed(hub: Any) -> None:
    files = {"config.json": b'{"a": 1}', "model.safetensors": b"x"}
    hub.repos["owner/folder"] = hub.Repo(files, sent={"config.json": b'{"a": 2}'})
    with pytest.raises(InputError, match=r"config\.json is not what the Hub says"):
        pull("hf:owner/folder")


def test_a_typo_gets_the_nearest_names(hub: Any, tiny: Any) -> None:
    for typo in ("hf:owner/tiny-GGFU", "hf:ownr/tiny-GGUF"):
        with pytest.raises(
            InputError, match=r"did you mean hf:owner/tiny-GGUF, and for a private one log in"
        ):
            pull(typo)
    with pytest.raises(InputError, match=r"check the name on its page"):
        pull("hf:nobody/knows-this")
    with pytest.raises(InputError, match=r"is not a name of the Hub; copy OWNER/NAME"):
        pull("hf:../tiny")


def test_a_gated_model_opens_with_a_token(hub: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.gated = True
    with pytest.raises(
        InputError, match=r"is gated \(401\): accept its terms on http.*/owner/tiny-GGUF, then log in"
    ):
        pull(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert pull(NAME).path.read_bytes() == GGUF


@pytest.mark.parametrize(
    ("status", "words"), [(403, "refuses your token .403.; make one"), (500, "answers 500; wait a minute")]
)
def test_other_answers_say_what_to_do(hub: Any, tiny: Any, status: int, words: str, quick: None) -> None:
    tiny.status = status
    with pytest.raises(InputError, match=words):
        pull(NAME)


def test_no_space_is_said_before_anything_is_fetched(hub: Any, tiny: Any) -> None:
    tiny.sizes["tiny.Q4_K_M.gguf"] = 10**18
    with pytest.raises(OutputError, match=r"takes 1000000000.00 GB and the disk of .* free; free some space"):
        pull(NAME)
    assert gets(hub) == []


def test_weights_larger_than_memory_are_not_fetched_to_be_loaded(hub: Any, tiny: Any) -> None:
    tiny.sizes["tiny.Q4_K_M.gguf"] = 10**15
    with pytest.raises(InputError, match=rf"1000000\.0 GB of weights.*; {NAME}:Q8_0 would fit"):
        pull(NAME, loads=True)


def test_without_a_network_the_cache_serves(hub: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull(NAME).path
    hub.shutdown()
    hub.server_close()
    close_session()
    assert pull(NAME).path == path
    with pytest.raises(InputError, match=r"cannot be reached.*no 'Q8_0'"):
        pull(f"{NAME}:Q8_0")
    with pytest.raises(UnreachableError, match=r"cannot be reached.*check the network"):
        pull("hf:owner/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pull(NAME).path == path
    with pytest.raises(UnreachableError, match=r"HF_HUB_OFFLINE is set; unset it"):
        pull("hf:owner/other")


def test_a_cache_that_cannot_be_written_is_said(
    hub: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file/hub"))
    with pytest.raises(OutputError, match=r"writing in .*file/hub failed: Not a directory; free some space"):
        pull(NAME)
