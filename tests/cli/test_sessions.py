"""`edgekv chat --session`, `--pack` and `edgekv pack` as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .conftest import Result

CHAT = ("--temp", 0, "-n", 8, "-t", 1)


def test_a_conversation_goes_on_in_another_process(
    edgekv: Callable[..., Result],
    refused: Callable[..., str],
    tiny_mla: Path,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    session = tmp_path / "talk.session"
    asked = ("--session", session, "-p", "Why is the sea salt?", "--json", *CHAT)
    first = edgekv("chat", tiny_mla, "--cache-type", "q8_0", "-c", 256, *asked)
    assert first.returncode == 0, first.stderr
    assert "[talk.session: a new session]" in first.stderr
    second = edgekv("chat", tiny_mla, *asked)
    assert second.returncode == 0, second.stderr
    assert "[talk.session: 1 turn, " in second.stderr
    figures = json.loads(second.stdout)
    assert figures["n_reused"] >= 20
    assert figures["n_ctx"] == 256
    assert "made with another tiny (other weights)" in refused(
        "chat", tiny_llama, "--session", session, "-p", "Hi"
    )
    assert "--cache-type q8_0" in refused(
        "chat", tiny_mla, "--session", session, "-p", "Hi", "--cache-type", "f16"
    )
    assert "no session of EdgeKV" in refused("chat", tiny_mla, "--session", tiny_mla, "-p", "Hi")
    assert "does not exist" in refused("chat", tiny_mla, "--session", tmp_path / "no" / "s", "-p", "Hi")


def test_packs(
    edgekv: Callable[..., Result], refused: Callable[..., str], tiny_mla: Path, tmp_path: Path
) -> None:
    packs = []
    for name in ("sea", "sand"):
        text, pack = tmp_path / f"{name}.txt", tmp_path / f"{name}.pack"
        text.write_text(f"The {name} is far. " * 8)
        made = edgekv("pack", text, "-m", tiny_mla, "-o", pack, "--cache-type", "q8_0", "-t", 1)
        assert made.returncode == 0, made.stderr
        assert made.stdout.startswith(f"wrote {pack}: ")
        packs.append(pack)
    asked = edgekv(
        "chat", tiny_mla, "--pack", packs[0], "--pack", packs[1], "-p", "Which?", "--json", "-c", 512, *CHAT
    )
    assert asked.returncode == 0, asked.stderr
    assert "tokens of sea.pack, sand.pack in the cache]" in asked.stderr
    assert json.loads(asked.stdout)["n_reused"] > 200
    checked = edgekv("pack", "--check", *packs, "-m", tiny_mla, "-n", 4, "-t", 1)
    assert checked.returncode == 0, checked.stderr
    assert "0 of each later pack" in checked.stdout
    report = json.loads(
        edgekv("pack", "--check", *packs, "-m", tiny_mla, "-n", 4, "--heads", 3, "--json").stdout
    )
    assert [loss["heads"] for loss in report["losses"]] == [3]
    assert "exists; pass --force" in refused("pack", tmp_path / "sea.txt", "-m", tiny_mla, "-o", packs[0])
    assert "cannot read" in refused("pack", tmp_path / "no.txt", "-m", tiny_mla, "-o", tmp_path / "no.pack")
