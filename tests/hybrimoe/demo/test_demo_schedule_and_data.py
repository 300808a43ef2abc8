import dataclasses

import numpy as np
import pytest

from hybrimoe.demo.training.corpora import Document
from hybrimoe.demo.training.data import WindowSampler, encode_corpus
from hybrimoe.demo.training.errors import CorpusError
from hybrimoe.demo.training.trainer import Schedule


def test_warm_up_stable_decay():
    schedule = Schedule(peak=1.0, warmup_steps=4, floor=0.1)
    assert [schedule.learning_rate(step) for step in (0, 1, 3, 4, 1000)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert schedule.end is None
    decaying = dataclasses.replace(schedule, decay_start=10, decay_steps=5)
    assert decaying.end == 15
    assert decaying.learning_rate(9) == 1.0
    assert decaying.learning_rate(10) == pytest.approx(0.82)
    assert decaying.learning_rate(14) == pytest.approx(0.1)


def test_an_epoch_visits_every_window_once_and_the_next_one_in_another_order():
    stream = np.arange(1000, dtype=np.int32)
    sampler = WindowSampler(stream, seq_len=10, batch_size=1, seed=3)
    n = sampler.windows_per_epoch
    epochs = [[int(sampler.batch(epoch * n + step)[0][0, 0]) for step in range(n)] for epoch in range(2)]
    for starts in epochs:
        assert len(set(starts)) == n
        assert sorted(starts) == list(range(min(starts), min(starts) + 10 * n, 10))
    assert sorted(epochs[0]) != epochs[0]
    assert epochs[0] != epochs[1]


def test_a_step_reads_the_same_whatever_was_read_before():
    stream = np.arange(500, dtype=np.int32)
    seen, fresh = (WindowSampler(stream, seq_len=8, batch_size=3, seed=1) for _ in range(2))
    for step in range(57):
        seen.batch(step)
    inputs, targets = seen.batch(40)
    assert (inputs == fresh.batch(40)[0]).all()
    assert (targets == inputs + 1).all()
    assert inputs.shape == (3, 8)


def test_a_stream_of_one_window_is_too_short():
    with pytest.raises(CorpusError, match="more than 16 tokens"):
        WindowSampler(np.arange(16, dtype=np.int32), seq_len=8, batch_size=1, seed=0)


def test_held_out_documents_are_kept_out_of_the_training_stream(tiny_tokenizer):
    documents = [Document("web", f"{number}", f"<{number}>") for number in range(300)]
    corpus = encode_corpus(documents, tiny_tokenizer, seed=0)
    trained = tiny_tokenizer.decode(corpus.train)
    kept_back = tiny_tokenizer.decode(corpus.held_out["web"])
    assert 0 < sum(document.held_out for document in documents) < 60
    for document in documents:
        assert (document.text in kept_back) == document.held_out
        assert (document.text in trained) != document.held_out
