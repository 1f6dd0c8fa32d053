"""Conversations that go on from a file, and packs of documents: what is said is what it would have been."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv.cache.rows import CacheRows
from edgekv.cache.rows_file import read_rows_file
from edgekv.chat.generate import Step
from edgekv.chat.packs import place_packs, read_pack
from edgekv.chat.sampling import SamplingParams
from edgekv.chat.saved import read_session
from edgekv.errors import BackendError, InputError, OutputError, UnsupportedError
from edgekv.workflows.chat import Chat, ChatRequest, open_chat
from edgekv.workflows.export import ExportOnnxRequest, export_onnx
from edgekv.workflows.pack import CheckPacksRequest, PackRequest, check_packs, pack_documents

GREEDY = SamplingParams(temperature=0)
QUESTIONS = ("Why is the sea salt?", "And the sky? " * 20, "Go on.")


def request(model: Path, session: Path | None = None, **options: object) -> ChatRequest:
    given = {"ctx_size": 512, "threads": 1, "sampling": GREEDY, "max_tokens": 12, **options}
    if model.is_dir():
        del given["threads"]
    return ChatRequest(model, session=session, **given)  # type: ignore[arg-type]


def last_step(chat: Chat, question: str) -> tuple[str, Step]:
    steps = [event for event in chat.ask(question) if isinstance(event, Step)]
    return "".join(step.text for step in steps), steps[-1]


@pytest.fixture(scope="module")
def onnx(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "mla"
    export_onnx(ExportOnnxRequest(tiny_mla, folder, weights="f32"))
    return folder


@pytest.mark.parametrize(
    ("kind", "cache_type"),
    [("mla", "q4_0"), ("gqa", "f16"), ("gqa", "q8_0/q4_0"), ("onnx", None), ("reference", None)],
)
def test_a_break_changes_nothing(
    kind: str, cache_type: str | None, tiny_mla: Path, tiny_llama: Path, onnx: Path, tmp_path: Path
) -> None:
    model = {"gqa": tiny_llama, "onnx": onnx}.get(kind, tiny_mla)
    options = {"cache_type": cache_type}
    if kind == "reference":
        options |= {"backend": "reference", "threads": None}
    with open_chat(request(model, **options)) as chat:
        expected = [chat.answer(question) for question in QUESTIONS]
    path = tmp_path / "talk.session"
    for i, question in enumerate(QUESTIONS):
        with open_chat(request(model, path, **({} if i and cache_type else options))) as chat:
            assert f"{i} turns" in chat.found[0] or i < 2
            n_cached = len(chat.session.generator.cached)
            answer, step = last_step(chat, question)
            assert answer == expected[i]
            assert step.timings.n_reused == n_cached - (i > 0) * (n_cached - step.timings.n_reused)
            assert step.timings.n_reused >= n_cached - 12  # an answer's text may be spelled in other tokens
    saved = read_session(path)
    assert saved is not None
    assert [turn[1] for turn in saved.notes.turns] == expected


def test_one_file_serves_all_engines(tiny_mla: Path, onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    engines = [
        (tiny_mla, {"cache_type": "f32"}),
        (onnx, {}),
        (tiny_mla, {"backend": "reference", "threads": None}),
    ]
    for model, options in engines:
        with open_chat(request(model, path, **options)) as chat:
            n_cached = len(chat.session.generator.cached)
            _, step = last_step(chat, "Why? " * 5)
            assert step.timings.n_reused >= n_cached - 12
            assert n_cached == 0 or step.timings.n_reused > 0
    with pytest.raises(
        InputError, match=r"made with a cache in f32, and this engine keeps q8_0; .*--cache-type f32"
    ):
        open_chat(request(tiny_mla, path, cache_type="q8_0")).__enter__()


def test_a_session_of_another_model_is_refused(tiny_mla: Path, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with open_chat(request(tiny_mla, path)) as chat:
        chat.answer("Why?")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"was made with another tiny \(other weights\); open the model"):
        open_chat(request(tiny_llama, path)).__enter__()
    assert path.read_bytes() == before


def test_only_new_rows_are_written(tiny_mla: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with open_chat(request(tiny_mla, path)) as chat:
        chat.answer("Why is the sea salt? " * 10)
        before = path.read_bytes()
        chat.answer("And?")
        assert path.read_bytes()[: len(before)] == before
        assert len(path.read_bytes()) - len(before) < len(before) / 2
        size = path.stat().st_size
    assert path.stat().st_size == size  # nothing was new at the end
    with open_chat(request(tiny_mla, path)) as chat:
        chat.session.clear()
    saved = read_session(path)
    assert saved is not None
    assert saved.notes.turns == ()
    assert saved.stored.tokens  # the rows may be of use yet


def test_turns_are_salvaged_from_a_damaged_file(tiny_mla: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with open_chat(request(tiny_mla, path)) as chat:
        expected = [chat.answer("Why is the sea salt? " * 10), chat.answer("And?")]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with open_chat(request(tiny_mla, path)) as chat:
        assert "2 turns, 0 tokens in the cache; damaged: bytes" in chat.found[0]
        assert [turn.answer for turn in chat.session.turns] == expected
        chat.answer("Go on.")
    assert read_rows_file(path, "edgekv.session").damage == ""


def test_a_session_that_is_open_is_not_opened_twice(tiny_mla: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with (
        open_chat(request(tiny_mla, path)),
        pytest.raises(InputError, match="another conversation has this session open; end it"),
        open_chat(request(tiny_mla, path)),
    ):
        pass
    with open_chat(request(tiny_mla, path)) as chat:
        chat.answer("Why?")


def test_a_dead_engine_takes_no_turns_with_it(tiny_mla: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    with open_chat(request(tiny_mla, path)) as chat:
        expected = chat.answer("Why?")
        tokens = chat.session.generator.cached
        os.kill(chat.engine.pid, signal.SIGKILL)
        with pytest.raises(BackendError):
            chat.answer("And?")
    saved = read_session(path)
    assert saved is not None
    assert saved.notes.turns == (("Why?", expected),)
    assert saved.notes.unanswered == "And?"
    assert saved.stored.tokens == tokens


# Packs

TEXTS = {"sea": "The sea is wet. " * 12, "sand": "Sand is dry and warm. " * 9, "sky": "The sky is far. " * 10}


@pytest.fixture(scope="module")
def packs(tiny_mla: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packs")
    made = {}
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
        made[name] = folder / f"{name}.pack"
        wanted = PackRequest((folder / f"{name}.txt",), tiny_mla, made[name], cache_type="q8_0", threads=1)
        result = pack_documents(wanted)
        assert result.movable
        assert result.nbytes == made[name].stat().st_size
    made["gqa"] = folder / "gqa.pack"
    wanted = PackRequest((folder / "sea.txt", folder / "sky.txt"), tiny_llama, made["gqa"], threads=1)
    assert not pack_documents(wanted).movable
    with pytest.raises(OutputError, match="exists; pass --force"):
        pack_documents(wanted)
    return made


@pytest.mark.parametrize("name", ["sea", "gqa"])
def test_one_pack_is_a_prefill(name: str, packs: dict[str, Path], tiny_mla: Path, tiny_llama: Path) -> None:
    model = tiny_llama if name == "gqa" else tiny_mla
    with open_chat(request(model, packs=(packs[name],), system="Be brief.")) as chat:
        n_cached = len(chat.session.generator.cached)
        assert n_cached == len(read_pack(packs[name]).documents)  # the tiny template has nothing in front
        answer, step = last_step(chat, "Which is wet?")
        assert step.timings.n_reused == n_cached
        chat.engine.trim(0)  # all is prefilled now
        chat.session.clear()
        again, step = last_step(chat, "Which is wet?")
        assert step.timings.n_reused == 0
        assert again == answer


def test_packs_stand_behind_each_other_in_any_order(
    packs: dict[str, Path], tiny_mla: Path, tmp_path: Path
) -> None:
    for order in (("sea", "sand", "sky"), ("sky", "sea", "sand")):
        found = check_packs(
            CheckPacksRequest(
                tuple(packs[name] for name in order), tiny_mla, threads=1, heads=(0, 16, 10_000)
            )
        )
        assert [loss.heads for loss in found.losses] == [0, 16, 10_000]
        none, some, every = (loss.kl for loss in found.losses)
        assert every < 1e-3 < none  # all tokens computed anew: only the batches differ
        assert some < none
        assert found.losses[2].same == 1
    session = tmp_path / "talk.session"
    both = tuple(packs[name] for name in ("sea", "sky"))
    with open_chat(request(tiny_mla, session, packs=both)) as chat:
        tokens = chat.session.generator.cached
        chat.answer("Which?")
    for again in ((), both):
        with open_chat(request(tiny_mla, session, packs=again)) as chat:
            _, step = last_step(chat, "And?")
            assert step.timings.n_reused >= len(tokens)
    with pytest.raises(InputError, match="began with other documents; leave --pack out"):
        open_chat(request(tiny_mla, session, packs=both[:1])).__enter__()


def test_packs_of_a_gqa_model_stand_alone(packs: dict[str, Path], tiny_llama: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"caches keys and values, .*; use one pack alone, or convert"):
        open_chat(request(tiny_llama, packs=(packs["gqa"], packs["gqa"]))).__enter__()
    with open_chat(request(tiny_llama)) as chat:
        engine = chat.engine
        with pytest.raises(
            UnsupportedError, match=r"was made for a prompt that begins otherwise, .*; make it again"
        ):
            place_packs(engine, engine.identity(), [read_pack(packs["gqa"])], [5])


def test_a_pack_that_is_damaged_or_too_large_is_refused(
    packs: dict[str, Path], tiny_mla: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    data = bytearray(packs["sea"].read_bytes())
    data[-300] ^= 4
    (tmp_path / "bad.pack").write_bytes(data)
    cases = {
        (tiny_mla, tmp_path / "bad.pack"): "is damaged|no save in it is whole",
        (tiny_llama, packs["sea"]): "was made with another tiny",
        (tiny_mla, packs["gqa"]): "was made with another tiny",
    }
    for (model, pack), words in cases.items():
        with pytest.raises(InputError, match=words):
            open_chat(request(model, packs=(pack,))).__enter__()
    with pytest.raises(InputError, match="the context holds 256; leave one out, or take a larger --ctx-size"):
        open_chat(request(tiny_mla, packs=(packs["sea"], packs["sand"]), ctx_size=256)).__enter__()
    with pytest.raises(InputError, match="name a session"):
        open_chat(request(tiny_mla, packs["sea"])).__enter__()


def test_a_prompt_that_begins_otherwise_moves_the_first_pack_too(
    packs: dict[str, Path], tiny_mla: Path
) -> None:
    pack = read_pack(packs["sea"])
    with open_chat(request(tiny_mla, cache_type="q8_0")) as chat:
        engine = chat.engine
        tokens = place_packs(engine, engine.identity(), [pack], [5, 6, 7])
        assert tokens == [5, 6, 7, *pack.documents]
        there = first_layer(engine.save(3))
        engine.trim(0)
        engine.prefill(tokens)
        computed = first_layer(engine.save(3))
        assert np.abs(there - computed).max() < 0.02 * np.abs(computed).max()


def first_layer(rows: CacheRows) -> np.ndarray:
    """Its values, in which no token sees another."""
    stored = np.ascontiguousarray(rows.planes()[0])
    return np.asarray(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0))
