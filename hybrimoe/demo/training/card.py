"""Writes the model card: `python -m hybrimoe.demo.training.card --corpora DIR --run RUN --model DIR`.

Everything it says about the model is measured here on the exported weights, or read from the run's own files.
"""

import argparse
import bz2
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hybrimoe.demo.training.corpora import SOURCES, Document, read_corpora
from hybrimoe.demo.training.data import encode_stream, token_byte_lengths
from hybrimoe.demo.training.evaluate import Evaluation, evaluate_stream
from hybrimoe.demo.training.plot import line_plot
from hybrimoe.demo.training.run_files import RunFiles
from hybrimoe.demo.training.settings import Settings

__all__ = ["DomainResult", "main", "render_card"]

NOTICE = "THIRD-PARTY.md"
CURVE = "curve.svg"
CURVE_ROWS = 12
"""Rows of the card's table of the training curve."""

SAMPLE_SEED = 7
SAMPLE_TOKENS = 90
PROMPTS = (
    "Elizabeth could not help smiling when",
    "The king said to his servants,",
    "The VACUUM command",
)


@dataclass(frozen=True, slots=True)
class DomainResult:
    """What is known about one domain: sizes in bytes and documents, and the score on its held-out part."""

    n_documents: int
    n_bytes: int
    n_held_out_documents: int
    held_out: Evaluation
    bzip2_bits_per_byte: float


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], seq_len: int
) -> dict[str, DomainResult]:
    """Scores the held-out documents of every domain in full."""
    byte_lengths = token_byte_lengths(tokenizer)
    results = {}
    for domain in SOURCES:
        members = [document for document in documents if document.domain == domain]
        texts = [document.text for document in members if document.held_out]
        raw = "".join(texts).encode()
        results[domain] = DomainResult(
            n_documents=len(members),
            n_bytes=sum(len(document.text.encode()) for document in members),
            n_held_out_documents=len(texts),
            held_out=evaluate_stream(model, encode_stream(texts, tokenizer), byte_lengths, seq_len),
            bzip2_bits_per_byte=8 * len(bz2.compress(raw)) / len(raw),
        )
    return results


def sample_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Prompt -> continuation with the model's own generation settings, drawn from a fixed seed."""
    texts = {}
    for prompt in PROMPTS:
        set_seed(SAMPLE_SEED)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS)[0, inputs["input_ids"].shape[1] :]
        texts[prompt] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters in all, in experts, in the embedding (shared with the output), and used by one token."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    used = experts * model.config.num_experts_per_tok // model.config.num_experts
    return {
        "total": total,
        "experts": experts,
        "embedding": model.get_input_embeddings().weight.numel(),
        "active": total - experts + used,
    }


def render_card(
    settings: Settings,
    metrics: Sequence[Mapping[str, Any]],
    results: Mapping[str, DomainResult],
    counts: Mapping[str, int],
    samples: Mapping[str, str],
) -> str:
    """The card as Markdown with the metadata block that model hubs read."""
    template = package_files("hybrimoe.demo.training").joinpath("card_template.md").read_text(encoding="utf-8")
    logged = [record for record in metrics if "loss" in record]
    shape = settings.shape
    return template.format(
        shape=shape,
        total=f"{counts['total']:,}",
        expert_parameters=f"{counts['experts']:,}",
        embedding=f"{counts['embedding']:,}",
        active=f"{counts['active']:,}",
        expert_size=f"{3 * shape.hidden_size * shape.expert_size:,}",
        corpora=_corpora_table(results),
        tokens=f"{metrics[-1]['tokens']:,}",
        tokens_argument=metrics[-1]["tokens"],
        even_share=f"{100 / shape.num_experts:.2f}",
        steps=f"{metrics[-1]['step']:,}",
        hours=f"{logged[-1]['hours'] * settings.threads:.2f}",
        batch_tokens=f"{settings.batch_size * settings.seq_len:,}",
        settings=settings,
        curve=_curve_table(metrics),
        scores=_score_table(results),
        load=_load_table([result.held_out for result in results.values()]),
        samples="\n\n".join(f"> **{prompt}**{_quoted(text)}" for prompt, text in samples.items()),
    )


def curve_plot(metrics: Sequence[Mapping[str, Any]]) -> str:
    """SVG of training loss in nats a token and of held-out bits a byte, by millions of tokens."""
    scored = [record for record in metrics if "bits_per_byte" in record]
    lines = {"loss (nats/token)": [(r["tokens"] / 1e6, r["loss"]) for r in metrics if "loss" in r]}
    for domain in SOURCES:
        lines[f"{domain} (bits/byte)"] = [(r["tokens"] / 1e6, r["bits_per_byte"][domain]) for r in scored]
    return line_plot("Training loss and held-out bits per byte", "tokens, millions", lines)


def _corpora_table(results: Mapping[str, DomainResult]) -> str:
    rows = []
    for domain, source in SOURCES.items():
        result = results[domain]
        size = f"{result.n_documents:,} | {result.n_bytes / 1e6:.2f} MB | {result.n_held_out_documents}"
        rows.append([domain, source.title, f"{source.package} {source.version}", source.licence, size])
    head = ["domain", "text", "Debian package", "licence", "documents", "size", "held-out documents"]
    return _table(head, rows)


def _curve_table(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Losses averaged between evaluations, thinned to CURVE_ROWS rows that include the last."""
    rows, losses = [], []
    for record in metrics:
        if "loss" in record:
            losses.append(record["loss"])
        elif losses:
            bits = [f"{record['bits_per_byte'][domain]:.3f}" for domain in SOURCES]
            rows.append([f"{record['tokens'] / 1e6:.2f}", f"{sum(losses) / len(losses):.3f}", *bits])
            losses = []
    stride = -(-len(rows) // CURVE_ROWS) if rows else 1
    kept = rows[::-1][::stride][::-1]
    return _table(["tokens, millions", "training loss, nats/token", *(f"{d}, bits/byte" for d in SOURCES)], kept)


def _score_table(results: Mapping[str, DomainResult]) -> str:
    rows = []
    for domain, result in results.items():
        score = result.held_out
        values = [f"{score.bits_per_byte:.3f}", f"{score.nats_per_token:.3f}", f"{result.bzip2_bits_per_byte:.3f}"]
        rows.append([domain, f"{score.n_bytes:,}", f"{score.n_tokens:,}", *values])
    return _table(["domain", "bytes", "tokens", "bits/byte", "nats/token", "bzip2 -9, bits/byte"], rows)


def _load_table(evaluations: Sequence[Evaluation]) -> str:
    """Load per layer over all domains, each weighted alike, and the entropy within each domain."""
    rows = []
    for layer, load in enumerate(torch.stack([evaluation.load for evaluation in evaluations]).mean(dim=0)):
        entropy = -(load * load.clamp_min(1e-12).log()).sum() / torch.log(torch.tensor(float(len(load))))
        own = [f"{evaluation.entropies()[layer]:.3f}" for evaluation in evaluations]
        shares = [f"{100 * float(load.min()):.2f} %", f"{100 * float(load.max()):.2f} %"]
        rows.append([str(layer), f"{float(entropy):.3f}", *shares, *own])
    return _table(["layer", "entropy", "least used", "most used", *(f"entropy in {d}" for d in SOURCES)], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quoted(text: str) -> str:
    return text.replace("\n", "\n> ")


def main(arguments: list[str] | None = None) -> int:
    """Command line; writes README.md, the curve and the notices into the model directory."""
    parser = argparse.ArgumentParser(
        prog="python -m hybrimoe.demo.training.card", description="Write the demo model's card."
    )
    parser.add_argument("--corpora", type=Path, required=True, help="folder with the three unpacked Debian packages")
    parser.add_argument("--run", type=Path, required=True, help="run directory of the training")
    parser.add_argument("--model", type=Path, required=True, help="exported model; the card goes there")
    options = parser.parse_args(arguments)
    run = RunFiles(options.run)
    settings = Settings.from_mapping(json.loads(run.settings.read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(
        options.model, experts_implementation="grouped_mm", trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    results = measure(model, tokenizer, read_corpora(options.corpora), settings.seq_len)
    metrics = run.read_metrics()
    card = render_card(settings, metrics, results, parameter_counts(model), sample_texts(model, tokenizer))
    (options.model / "README.md").write_text(card, encoding="utf-8")
    (options.model / CURVE).write_text(curve_plot(metrics), encoding="utf-8")
    with (
        package_files("hybrimoe.demo").joinpath(NOTICE).open("rb") as source,
        (options.model / NOTICE).open("wb") as to,
    ):
        shutil.copyfileobj(source, to)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
