"""Text that the teacher writes: its logits beside the NumPy reference's, and what its sequences begin with."""

from itertools import repeat

import numpy as np
import pytest

from edgekv.heal.teacher_text import CPU_SEQUENCES, OPENING_TOKENS, opening, write_text
from edgekv.reference.model import ReferenceModel
from edgekv.text.chats import Chat
from edgekv.text.shards import Shard
from tests.heal.conftest import random_source

torch = pytest.importorskip("torch")


def test_logits_are_those_of_the_reference():
    from edgekv.heal.teacher_text import Writer

    source = random_source()
    tokens = np.random.default_rng(1).integers(0, source.spec.vocab, (3, 9))
    writer, a = Writer(source, 9, torch.device("cpu")), source.spec.layers[0].attention
    cache = torch.empty((source.spec.n_layers, 2, 3, 9, a.n_kv_heads, a.head_dim))
    with torch.no_grad():
        found = [writer.step(torch.from_numpy(tokens[:, i]), cache, i).numpy() for i in range(9)]
    for row in range(3):
        model = ReferenceModel(source)
        reference = model.logits(model.hidden(tokens[row], model.new_cache(9)))
        np.testing.assert_allclose(np.array(found)[:, row], reference, atol=2e-5)


def test_sequences_go_on_from_the_text_and_from_questions():
    source = random_source()
    shards = [
        Shard("a", "0", np.arange(20, dtype=np.uint16)),
        Shard("b", "1", np.arange(20, 60, dtype=np.uint16)),
    ]
    rng = np.random.default_rng(2)
    starts = [opening(shards, 5, rng) for _ in range(300)]
    assert all(start == list(range(start[0], start[0] + 5)) for start in starts)
    assert all(not start[0] < 20 <= start[-1] for start in starts)  # of one text, not over its end
    assert 150 < sum(start[0] >= 20 for start in starts) < 250  # the longer text twice as often
    chat = Chat(lambda question: [1, 2, 3], [7], 0)
    said: list[int] = []
    shape = (CPU_SEQUENCES + 4, 6)
    rows = write_text(
        source, repeat([4, 5]), chat, 4, shape, 0, torch.device("cpu"), lambda done, total: said.append(done)
    )
    for i, row in enumerate(rows.tolist()):
        first = [1, 2, 3] if i % 4 == 3 else [4, 5]
        assert row[: len(first)] == first
    assert said == sorted(said)
    assert said[-1] == shape[0] * shape[1]


def test_a_short_text_is_an_opening_whole():
    assert opening(
        [Shard("a", "0", np.arange(3, dtype=np.uint16))], OPENING_TOKENS, np.random.default_rng(0)
    ) == [0, 1, 2]
