"""`edgekv serve --packs --sessions`, as a client sees them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from edgekv.workflows.pack import PackRequest, pack_documents

EDGEKV = str(Path(sys.executable).parent / "edgekv")
TEXT = "Tides come and go. " * 20
OPTIONS = ("-c", "1024", "--parallel", "2")


@pytest.fixture(scope="module")
def packs(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    (folder / "tides.txt").write_text(TEXT)
    pack_documents(
        PackRequest((folder / "tides.txt",), tiny_mla, folder / "tides.pack", cache_type="f32", threads=1)
    )
    (folder / "broken.pack").write_bytes(b"EKVB")
    return folder


def test_packs_by_their_names(tiny_mla: Path, packs: Path, serving: Callable[..., Any]) -> None:
    with serving(tiny_mla, *OPTIONS, "--packs", str(packs)) as server:
        broken, tides = server.client.get("/v1/packs").json()["data"]
        assert (tides["id"], tides["object"], tides["documents"]) == ("tides", "pack", ["tides.txt"])
        assert broken["id"] == "broken"
        assert "header is damaged" in broken["error"]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked: Any = {
                "model": "tiny-mla",
                "messages": [{"role": "user", "content": "When?"}],
                "max_tokens": 8,
            }
            asked["model"] = client.models.list().data[0].id
            answer = client.chat.completions.create(**asked, temperature=0, extra_body={"packs": ["tides"]})
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == tides["tokens"]
            assert answer.usage.prompt_tokens == tides["tokens"] + 5
            asked["messages"] = [{"role": "system", "content": TEXT.strip() + "\n\n"}, *asked["messages"]]
            prefilled = client.chat.completions.create(**asked, temperature=0)
            assert prefilled.choices[0].message.content == answer.choices[0].message.content
            with pytest.raises(
                openai.BadRequestError, match="there is no pack 'moon' here; there are: tides"
            ):
                client.chat.completions.create(**asked, extra_body={"packs": ["moon"]})


def test_what_was_read_is_there_after_a_restart(
    tiny_mla: Path, tmp_path: Path, serving: Callable[..., Any]
) -> None:
    options = (*OPTIONS, "--sessions", str(tmp_path / "kept"), "--sessions-bytes", "10000000")
    with serving(tiny_mla, *options) as server:
        first = server.chat(TEXT).json()
        engine = server.engine()
        assert server.end() == 130
        assert not psutil.pid_exists(engine.pid)
    with serving(tiny_mla, *options) as server:
        again = server.chat(TEXT).json()
        assert again["choices"] == first["choices"]
        used = again["usage"]
        assert used["prompt_tokens_details"]["cached_tokens"] == used["prompt_tokens"] - 1
        assert 0 < server.figures()["disk_bytes"] <= 10_000_000
        assert server.figures()["restored_tokens_total"] == used["prompt_tokens"] - 1
        server.engine().send_signal(signal.SIGKILL)  # the next engine finds it too
        assert server.chat("well").status_code in (200, 503)
        again = server.chat(TEXT).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == used["prompt_tokens"] - 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--packs", "nowhere"), "cannot read packs in nowhere"),
        (("--sessions", "a/b"), "sessions cannot be kept in a/b"),
    ],
)
def test_folders_that_cannot_be_used(
    tiny_mla: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    command = [EDGEKV, "serve", str(tiny_mla), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
