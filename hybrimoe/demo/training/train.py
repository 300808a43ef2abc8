"""Trains the demo model: `python -m hybrimoe.demo.training.train --corpora DIR --out RUN`.

A run can be stopped (Ctrl-C, SIGTERM) and started again with the same command: it continues where the last
checkpoint is, with the same numbers as if it had never stopped. `touch RUN/finish` starts the final decay.
"""

import argparse
import dataclasses
import logging
import os
import signal
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from hybrimoe.demo.training.corpora import read_corpora
from hybrimoe.demo.training.data import encode_corpus
from hybrimoe.demo.training.run_files import RunFiles
from hybrimoe.demo.training.settings import Settings
from hybrimoe.demo.training.tokenizer import train_tokenizer
from hybrimoe.demo.training.trainer import Trainer

__all__ = ["export_model", "main", "open_run"]


SAMPLING = {
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "max_new_tokens": 200,
}
"""Defaults written to generation_config.json: greedy text of so small a model repeats itself."""
MAY_CHANGE = frozenset(
    {"max_tokens", "max_hours", "log_steps", "checkpoint_steps", "evaluate_steps", "evaluate_windows"}
)
"""Settings that a run can be continued with in another value: they do not touch what a step computes."""


def open_run(settings: Settings, corpora: Path, out: Path) -> tuple[Trainer, PreTrainedTokenizerBase]:
    """Reads the corpora, trains or loads the run's tokenizer, and resumes the run if it has a checkpoint."""
    files = RunFiles(out)
    values = dataclasses.asdict(settings)
    if files.settings.exists():
        files.check_settings(values, MAY_CHANGE)
    else:
        files.write_settings(values)
    documents = read_corpora(corpora)
    if not files.tokenizer.is_dir():
        texts = (document.text for document in documents if not document.held_out)
        shape = settings.shape
        train_tokenizer(texts, shape.vocab_size, shape.max_positions).save_pretrained(files.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer, trust_remote_code=False)
    trainer = Trainer(settings, encode_corpus(documents, tokenizer, settings.seed), tokenizer, files)
    trainer.resume()
    return trainer, tokenizer


def export_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Saves a bfloat16 copy of `model` and `tokenizer` in `directory`, in Hugging Face layout, one tensor an expert.

    Each file is written beside its place and then moved there: who reads meanwhile sees a whole file, old or new.
    """
    copy = Qwen3MoeForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    copy.generation_config = GenerationConfig(**ids, **SAMPLING)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        copy.save_pretrained(name)
        tokenizer.save_pretrained(name)
        for file in sorted(Path(name).iterdir()):
            file.chmod(0o644)
            os.replace(file, directory / file.name)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0 when the run has ended, 1 when it was stopped and can be resumed."""
    parser = argparse.ArgumentParser(prog="python -m hybrimoe.demo.training.train", description=__doc__)
    parser.add_argument("--corpora", type=Path, required=True, help="folder with the three unpacked Debian packages")
    parser.add_argument("--out", type=Path, required=True, help="run directory: checkpoint, metrics, tokenizer")
    parser.add_argument("--export", type=Path, help="where the finished model goes (default: OUT/model)")
    parser.add_argument("--hours", type=float, help="processor hours a thread, decay included")
    parser.add_argument("--tokens", type=int, help="tokens to train on, decay included")
    parser.add_argument("--learning-rate", type=float, default=Settings().learning_rate)
    parser.add_argument("--batch-size", type=int, default=Settings().batch_size, help="windows of 512 tokens")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)  # the trainer's own threads share the work; inside them a product runs on one
    settings = Settings(
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        precision=options.precision,
        threads=options.threads,
        seed=options.seed,
        max_hours=options.hours,
        max_tokens=options.tokens,
    )
    trainer, tokenizer = open_run(settings, options.corpora, options.out)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: stopped.append(received))
    ended = trainer.run(should_stop=lambda: bool(stopped))
    export_model(trainer.model, tokenizer, options.export or trainer.files.model)
    return 0 if ended else 1


if __name__ == "__main__":
    raise SystemExit(main())
