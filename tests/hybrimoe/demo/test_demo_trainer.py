import dataclasses
import itertools
import json
import os

import pytest
import torch

from hybrimoe.demo.training.run_files import RunFiles
from hybrimoe.demo.training.settings import Settings
from hybrimoe.demo.training.trainer import Trainer
from hybrimoe.errors import CheckpointError, ConfigError

COMPARED = ("loss", "balance", "z", "grad_norm", "learning_rate", "entropy", "bits_per_byte")


def computed(files: RunFiles) -> list[dict]:
    return [{name: record.get(name) for name in ("step", *COMPARED)} for record in files.read_metrics()]


@pytest.fixture
def new_trainer(tiny_settings, tiny_corpus, tiny_tokenizer):
    def build(directory, **changes):
        settings = dataclasses.replace(tiny_settings, **changes)
        return Trainer(settings, tiny_corpus, tiny_tokenizer, RunFiles(directory))

    return build


@pytest.fixture
def whole_run(new_trainer, tmp_path):
    trainer = new_trainer(tmp_path / "whole")
    assert trainer.run()
    return trainer


def test_training_learns_and_ends_where_it_was_told_to(whole_run, tiny_settings):
    losses = [record["loss"] for record in whole_run.files.read_metrics() if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    assert whole_run.tokens == tiny_settings.max_tokens
    assert whole_run.schedule.decay_start == 10


@pytest.mark.parametrize("steps_before_stop", [3, 12])
def test_a_stopped_run_continues_with_the_same_bits(new_trainer, whole_run, tmp_path, steps_before_stop):
    calls = itertools.count()
    assert not new_trainer(tmp_path / "run").run(should_stop=lambda: next(calls) >= steps_before_stop)
    resumed = new_trainer(tmp_path / "run")
    assert resumed.resume()
    assert resumed.step == steps_before_stop
    assert resumed.run()
    assert computed(resumed.files) == computed(whole_run.files)
    for ours, theirs in zip(resumed.parameters, whole_run.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_a_killed_run_forgets_what_its_checkpoint_does_not_have(new_trainer, whole_run, tmp_path):
    class Killed(Exception):
        pass

    def kill():
        if trainer.step == 6:
            raise Killed
        return False

    trainer = new_trainer(tmp_path / "run")
    with pytest.raises(Killed):
        trainer.run(should_stop=kill)
    trainer.files.checkpoint.with_suffix(".tmp").write_bytes(b"half a checkpoint")
    resumed = new_trainer(tmp_path / "run")
    assert resumed.resume()
    assert resumed.step == 4
    assert resumed.run()
    assert computed(resumed.files) == computed(whole_run.files)


def test_a_checkpoint_is_replaced_in_one_move(tmp_path, monkeypatch):
    files = RunFiles(tmp_path)
    files.save_checkpoint({"step": 1})

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        files.save_checkpoint({"step": 2})
    assert files.load_checkpoint() == {"step": 1}


def test_a_damaged_checkpoint_is_named(tmp_path):
    files = RunFiles(tmp_path)
    files.save_checkpoint({"step": 1})
    files.checkpoint.write_bytes(files.checkpoint.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        files.load_checkpoint()


def test_a_run_is_not_continued_with_other_settings(tmp_path, tiny_settings):
    files = RunFiles(tmp_path)
    files.write_settings(dataclasses.asdict(tiny_settings))
    assert Settings.from_mapping(json.loads(files.settings.read_text())) == tiny_settings
    longer = dataclasses.asdict(dataclasses.replace(tiny_settings, max_tokens=10**9))
    files.check_settings(longer, frozenset({"max_tokens"}))
    other = dataclasses.asdict(dataclasses.replace(tiny_settings, seed=2))
    with pytest.raises(ConfigError, match="seed=1, found 2"):
        files.check_settings(other, frozenset({"max_tokens"}))


def test_the_finish_file_starts_the_decay(new_trainer, tmp_path):
    trainer = new_trainer(tmp_path, max_tokens=None)
    trainer.files.finish.touch()
    trainer.step = 8
    assert trainer.run()
    assert (trainer.schedule.decay_start, trainer.schedule.decay_steps) == (8, 4)


def test_the_time_limit_counts_processor_time(new_trainer, tmp_path):
    trainer = new_trainer(tmp_path, max_tokens=None, max_hours=1e-9)
    trainer.step = 4
    assert trainer.run()
    assert trainer.step == 6


def test_bfloat16_training_lowers_the_loss(new_trainer, tmp_path):
    trainer = new_trainer(tmp_path, precision="bf16")
    assert trainer.run()
    losses = [record["loss"] for record in trainer.files.read_metrics() if "loss" in record]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stable_seq_len": 5}, "multiple of stable_seq_len, found 16 and 5"),
        ({"threads": 3}, "multiple of threads, found 4 and 3"),
        ({"precision": "fp8"}, "found 'fp8'"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny_settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny_settings, **changes)
