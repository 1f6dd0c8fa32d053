"""Jobs side by side over a small random model: each answer is that of a lone run."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from edgekv.backends.open import model_identity, open_sequences
from edgekv.serve.engine.packs import PackFolder
from edgekv.serve.engine.scheduler import Scheduler
from edgekv.workflows.pack import PackRequest, pack_documents

Events = list[dict[str, Any]]
NEAR = 0.05  # two tokens whose ln p differ by less may change places by rounding


class Desk:
    """A scheduler, and what it has sent by job."""

    def __init__(
        self, path: Path, n_parallel: int = 3, n_ctx: int = 256, folder: Path | None = None, **options: Any
    ) -> None:
        options = {"cache_type": "f32", "n_threads": 1} | options
        self.engine = open_sequences(path, n_parallel=n_parallel, n_ctx=n_ctx, **options)
        packs = PackFolder(folder, model_identity(path), self.engine.layout()) if folder else None
        self.sent: defaultdict[int, Events] = defaultdict(list)
        self.stats: dict[str, Any] = {}
        self.scheduler = Scheduler(self.engine, self.engine.language(), self._take, packs)

    def _take(self, message: dict[str, Any]) -> None:
        if "stats" in message:
            self.stats = message["stats"]
        else:
            self.sent[message["id"]].append(message)

    def start(self, id: int, prompt: str | list[int] | list[dict[str, str]], **wanted: Any) -> None:
        kind = "text" if isinstance(prompt, str) else "tokens" if isinstance(prompt[0], int) else "messages"
        given = {"text": None, "tokens": None, "messages": None, kind: prompt}
        usual = {
            "sampling": {"temperature": 0},
            "max_tokens": 12,
            "stop": [],
            "top_logprobs": 2,
            "schema": None,
        }
        self.scheduler.start(id, **given, json_object=False, **(usual | wanted))  # type: ignore[arg-type]

    def run(self) -> None:
        while self.scheduler.busy:
            self.scheduler.step()
        self.scheduler.tell()

    def logprobs(self, id: int) -> list[Any]:
        return [each for event in self.sent[id] for each in event.get("logprobs", [])]

    def text(self, id: int) -> str:
        return "".join(event.get("text", "") for event in self.sent[id])


@pytest.fixture
def desk(tiny_llama: Path) -> Iterator[Desk]:
    desk = Desk(tiny_llama)
    yield desk
    desk.engine.close()


def require_same(one: list[Any], two: list[Any]) -> None:
    """The same tokens, but after two of them were as good as equal."""
    for ((name, value), top), ((other, _), _) in zip(one, two, strict=True):
        if name != other:
            assert top[0][1] - top[1][1] < NEAR, (name, other, value, top)
            return


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_parallel_answers_are_those_of_lone_runs(request: pytest.FixtureRequest, model: str) -> None:
    path = request.getfixturevalue(model)
    prompts = ["a" * 70 + "bc", "tell me", "a" * 70 + "bd", "zz zz " * 20, "one more", "a" * 70 + "bc and on"]
    lone = Desk(path, n_parallel=1)
    for i, prompt in enumerate(prompts):
        lone.start(i, prompt)
        lone.run()
        lone.scheduler.prefixes.make_room(lone.engine.n_cells)  # nothing is reused
    desk = Desk(path)
    waiting = dict(enumerate(prompts))
    while waiting or desk.scheduler.busy:
        if waiting and len(desk.scheduler._jobs) < 3:
            id = min(waiting)
            desk.start(id, waiting.pop(id))
        desk.scheduler.step()
    for i in range(len(prompts)):
        assert len(lone.logprobs(i)) >= 8
        require_same(lone.logprobs(i), desk.logprobs(i))
    assert desk.sent[2][-1]["n_reused"] >= 70
    assert desk.sent[5][-1]["n_reused"] >= 70
    assert all(lone.sent[i][-1]["n_reused"] == 0 for i in range(len(prompts)))
    for each in (lone, desk):
        each.engine.close()


def test_others_talk_while_a_long_prompt_is_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekv.serve.engine.scheduler.SLICE_S", 0.0)  # slices of 16 tokens
    desk.start(1, "hello", max_tokens=60)
    desk.scheduler.step()
    desk.start(2, list(range(200)), max_tokens=1)
    talked = 0
    while not any("text" in event for event in desk.sent[2]):
        before = len(desk.logprobs(1))
        desk.scheduler.step()
        talked += len(desk.logprobs(1)) + len(desk.scheduler._jobs[1]._pending) > before
    read = [event["n_read"] for event in desk.sent[2] if "n_read" in event]
    assert read == list(range(16, 200, 16))
    assert talked == len(read) + 1


def test_two_equal_prompts_at_once_are_computed_once(desk: Desk) -> None:
    for id in (1, 2):
        desk.start(id, list(range(200)), max_tokens=2)
    desk.run()
    assert desk.stats["n_prefilled"] <= 201
    require_same(desk.logprobs(1), desk.logprobs(2))


def test_a_stopped_job_leaves_and_its_rows_stay(desk: Desk) -> None:
    desk.start(1, "x" * 100, max_tokens=100)
    for _ in range(5):
        desk.scheduler.step()
    desk.scheduler.stop(1)
    desk.scheduler.stop(77)
    assert not desk.scheduler.busy
    desk.scheduler.tell()
    assert (desk.stats["n_running"], desk.stats["cells_used"]) == (0, desk.stats["cells_kept"])
    desk.start(2, "x" * 100)
    assert desk.sent[2][0] == {"id": 2, "n_prompt": 100, "n_reused": 99}


def test_a_full_context_ends_an_answer(desk: Desk) -> None:
    for id in range(3):
        desk.start(id, [id] * 200, max_tokens=None)
    desk.run()
    for id in range(3):
        last = desk.sent[id][-1]
        assert last["finish"] in ("length", "stop")
        assert last["finish"] == "stop" or last["n_generated"] == 56
    assert desk.stats["cells_used"] <= desk.engine.n_cells


@pytest.mark.parametrize(
    ("prompt", "wanted", "words"),
    [
        ([1] * 256, {}, "256 tokens and the context holds 256; shorten it"),
        ("", {}, "send some text"),
        ([5, 260], {}, "outside the vocabulary"),
        ("x", {"sampling": {"top_p": -1}}, "top_p is -1"),
        ("x", {"schema": '{"type": "nonsense"}'}, "JSON schema cannot be followed"),
        ("x", {"schema": '{"$ref": "https://example.com/a"}'}, "JSON schema cannot be followed"),
    ],
)
def test_refused_jobs_take_nothing(desk: Desk, prompt: Any, wanted: Any, words: str) -> None:
    desk.start(1, prompt, **wanted)
    (event,) = desk.sent[1]
    assert event["error"][0] == "InputError"
    assert words in event["error"][1]
    assert not desk.scheduler.busy
    assert not desk.scheduler.prefixes._running


def test_a_chat_goes_through_the_template(desk: Desk) -> None:
    desk.start(1, [{"role": "system", "content": "be"}, {"role": "user", "content": " kind"}], max_tokens=1)
    desk.start(2, "be kind", max_tokens=1)
    assert desk.sent[1][0]["n_prompt"] == desk.sent[2][0]["n_prompt"] == 7


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "n": {"type": "integer", "minimum": 3, "maximum": 12},
        "kind": {"enum": ["a", "b", None]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "n", "kind", "list"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
def test_answers_follow_their_schema(desk: Desk, seed: int) -> None:
    """A random model at a high temperature writes what it may, and ends."""
    sampling = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed}
    desk.start(1, "json:", max_tokens=200, sampling=sampling, schema=json.dumps(SCHEMA))
    desk.start(2, "free", max_tokens=200, sampling=sampling)
    desk.run()
    assert desk.sent[1][-1]["finish"] == "stop", desk.sent[1][-1]
    jsonschema.validate(json.loads(desk.text(1)), SCHEMA)


def test_logprobs_are_those_of_the_model(desk: Desk) -> None:
    desk.start(1, "logs", max_tokens=3, sampling={"temperature": 1.5, "seed": 1}, top_logprobs=5)
    desk.run()
    for (name, value), top in desk.logprobs(1):
        values = [each for _, each in top]
        assert len(top) == 5
        assert values == sorted(values, reverse=True)
        assert sum(np.exp(values)) <= 1 + 1e-9
        assert value <= values[0]
        assert dict(map(tuple, top)).get(name, value) == value


def test_a_seed_gives_the_same_answer_beside_others(desk: Desk) -> None:
    sampling = {"temperature": 1.0, "seed": 5}
    desk.start(1, "roll", sampling=sampling)
    desk.run()
    desk.start(2, "roll", sampling=sampling)
    desk.start(3, "roll", sampling=sampling | {"seed": 6})
    desk.run()
    assert desk.text(1) == desk.text(2) != desk.text(3)


def test_stop_texts_are_never_given_out(desk: Desk) -> None:
    sampling = {"temperature": 0}
    desk.start(1, "stops", sampling=sampling, max_tokens=40, top_logprobs=None)
    desk.run()
    whole = desk.text(1)
    stop = whole[3:5]
    desk.start(2, "stops", sampling=sampling, max_tokens=40, stop=[stop], top_logprobs=None)
    desk.run()
    assert desk.text(2) == whole[: whole.index(stop)]
    assert desk.sent[2][-1]["finish"] == "stop"


def test_the_reference_answers_one_at_a_time(tiny_llama: Path) -> None:
    desk = Desk(tiny_llama, n_parallel=1, kind="reference", cache_type=None, n_threads=None)
    other = Desk(tiny_llama, n_parallel=1)
    for each in (desk, other):
        each.start(1, "the same")
        each.run()
        each.start(2, "the same")
        each.run()
        assert each.sent[2][0]["n_reused"] == 0  # shorter than a block
        each.engine.close()
    require_same(desk.logprobs(1), other.logprobs(1))


DOCUMENTS = {"a": "The first one. " * 6, "b": "And another text. " * 5}


def make_packs(folder: Path, model: Path, template: bool = True) -> Path:
    folder.mkdir()
    for name, text in DOCUMENTS.items():
        document = folder / f"{name}.txt"
        document.write_text(text)
        output = folder / f"{name}.pack"
        pack_documents(
            PackRequest((document,), model, output, cache_type="f32", threads=1, template=template)
        )
    return folder


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mla"])
def test_a_pack_is_put_in_front_without_a_prefill(
    request: pytest.FixtureRequest, model: str, tmp_path: Path
) -> None:
    path = request.getfixturevalue(model)
    desk = Desk(path, folder=make_packs(tmp_path / "packs", path))
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": " kind"}]
    desk.start(1, chat, packs=["a"])
    desk.run()
    text = DOCUMENTS["a"].strip() + "\n\n"
    assert desk.sent[1][0]["n_prompt"] - desk.sent[1][0]["n_reused"] == 7
    assert desk.sent[1][0]["n_reused"] == len(desk.engine.language().encode(text))
    plain = Desk(path)
    plain.start(1, [{"role": "user", "content": text + "be kind"}])
    plain.run()
    require_same(plain.logprobs(1), desk.logprobs(1))
    desk.start(2, [{"role": "user", "content": " else"}], packs=["a"])
    assert desk.sent[2][0]["n_reused"] >= desk.sent[1][0]["n_reused"]
    desk.run()
    for id, names, words in (
        (3, ["c"], "no pack 'c' here; there are: a, b"),
        (4, ["a"] * 9, "context holds"),
    ):
        desk.start(id, chat, packs=names)
        assert words in desk.sent[id][0]["error"][1]
    plain.start(5, chat, packs=["a"])
    assert "start it with --packs" in plain.sent[5][0]["error"][1]
    for each in (desk, plain):
        each.engine.close()


def test_packs_of_a_latent_model_stand_behind_each_other(tiny_mla: Path, tmp_path: Path) -> None:
    """What they give is kept apart from what a prefill of the same tokens gives."""
    desk = Desk(tiny_mla, n_ctx=512, folder=make_packs(tmp_path / "packs", tiny_mla, template=False))
    prompt = "".join(DOCUMENTS[name].strip() + "\n\n" for name in "ba") + "so"
    desk.start(1, "so", packs=["b", "a"])
    assert desk.sent[1][0]["n_prompt"] - desk.sent[1][0]["n_reused"] == 2
    desk.start(2, prompt)
    assert desk.sent[2][0] == {"id": 2, "n_prompt": desk.sent[1][0]["n_prompt"], "n_reused": 0}
    desk.run()
    desk.start(3, "so", packs=["b", "a"])
    assert desk.sent[3][0]["n_reused"] == desk.sent[1][0]["n_prompt"] - 1
    desk.start(4, "so", packs=["a", "b"])
    desk.run()
    assert desk.logprobs(4)[0] != desk.logprobs(3)[0]
    require_same(desk.logprobs(3), desk.logprobs(1))
    desk.engine.close()


def test_packs_that_cannot_be_used_are_told(tiny_mla: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = make_packs(tmp_path / "packs", tiny_llama)
    data = bytearray((folder / "b.pack").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "b.pack").write_bytes(data)
    desk = Desk(tiny_llama, folder=folder)
    assert desk.scheduler._packs is not None
    first, second = desk.scheduler._packs.about
    assert first["documents"] == ["a.txt"]
    assert "is damaged" in second["error"]
    desk.start(1, "x", packs=["a", "a"])
    assert "use one pack alone" in desk.sent[1][0]["error"][1]
    desk.start(2, "x")
    (folder / "a.pack").unlink()
    desk.start(3, "x", packs=["a"])
    assert "cannot be read any more" in desk.sent[3][0]["error"][1]
    desk.run()
    assert desk.sent[2][-1]["finish"]
    desk.engine.close()
    other = PackFolder(folder, model_identity(tiny_mla), ())
    assert len(other.about) == 1
