"""Which micro-batches are the worst."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.data import index_of, say, write_image
from vtprune_train.training.faults import preflight


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Samples of very different lengths, a third of them with up to three images."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    records = []
    for number in range(40):
        images = [f"{number}-{i}.png" for i in range(number % 4 if number % 3 == 0 else 0)]
        for name in images:
            write_image(folder / "images" / name, (int(rng.integers(20, 60)), int(rng.integers(20, 60))), seed=number)
        question = "<image> " * len(images) + "what is shown " * int(rng.integers(1, 12))
        records.append({"id": str(number), "image": images, "conversations": say(question, "a cat")})
    return index_of(folder, records, max_length=2000)[0]


def trainer_of(index, global_batch_size=4):
    config = SimpleNamespace(
        train=SimpleNamespace(global_batch_size=global_batch_size), data=SimpleNamespace(max_tokens=900)
    )
    return SimpleNamespace(config=config, collate=SimpleNamespace(index=index))


def test_pieces_of_the_index_give_the_same_as_all_at_once(index, monkeypatch):
    whole = preflight.worst_micro_batches(trainer_of(index))
    lengths = index.lengths(np.arange(len(index)))
    expected = [sorted(preflight.heaviest(lengths.tokens, w, 900, 4)) for w in (lengths.text, lengths.tiles)]
    assert whole == expected and len(whole) == 2 and whole[0] != whole[1]
    for piece in (1, 7, 39):
        monkeypatch.setattr(preflight, "LOOKED_AT", piece)
        assert preflight.worst_micro_batches(trainer_of(index, 1)) == [
            sorted(preflight.heaviest(lengths.tokens, w, 900, 1)) for w in (lengths.text, lengths.tiles)
        ]
        monkeypatch.setattr(preflight, "LOOKED_AT", 1 << 20)


def test_every_sample_is_measured_once(index, monkeypatch):
    """But for the best of the piece before, which compete with the next one, and stand for all in the end."""
    measured, lengths = [], index.lengths
    monkeypatch.setattr(preflight, "LOOKED_AT", 20)
    monkeypatch.setattr(index, "lengths", lambda samples: (measured.append(len(samples)), lengths(samples))[1])
    preflight.worst_micro_batches(trainer_of(index, 1))
    pieces, kept = measured[:2], measured[2:]
    assert pieces[0] == 20 and 20 < pieces[1] <= 20 + 4 * 8 and len(kept) == 2 and max(kept) <= 16
