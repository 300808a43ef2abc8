"""Whole tasks of lm-evaluation-harness, of its own client against the server; skipped where `lm_eval` is missing.

Its data sets come from a network; these are files. docs/clients.md has the same at the command line.
"""

import contextlib
import json

import pytest

from hybrimoe.config.deploy import ServerConfig
from hybrimoe.demo import demo_model_path
from hybrimoe.server.http import HttpServer, listening
from hybrimoe.server.models import Models
from hybrimoe.server.served import Served

QUESTIONS = [
    {"question": f"The {thing} is", "choices": [f" {right}", f" {wrong}"], "answer": 0}
    for thing, right, wrong in [
        ("sun", "bright", "wet"), ("sea", "deep", "dry"), ("night", "dark", "green"), ("ice", "cold", "loud"),
        ("king", "old", "blue"), ("road", "long", "sweet"), ("fire", "hot", "late"), ("snow", "white", "quick"),
    ]
] * 3  # fmt: skip
CHOOSE = """
task: hybrimoe_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
CONTINUE = """
task: hybrimoe_continue
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def evaluate(tmp_path, generator, monkeypatch):
    """`evaluate(kind, path, task, **more)`: results of a task, by lm_eval's model `kind` at a path of the server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    pytest.importorskip("datasets", reason="lm-evaluation-harness is not complete")
    from lm_eval.tasks import TaskManager

    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(one) for one in QUESTIONS), encoding="utf-8")
    for name, task in (("choose", CHOOSE), ("continue", CONTINUE)):
        text = task.format(questions=questions, cache=tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")

    served = Served("tiny", parallel=2)
    served.open(generator)
    settings = ServerConfig(access_log=False, strict=True)
    with (
        contextlib.closing(served),
        listening("127.0.0.1", 0) as listener,
        HttpServer(Models.of_one(served), settings, [], listener) as http,
    ):

        def run(kind, path, task, *, chat=False, **more):
            model = {"model": "tiny", "base_url": http.url + path, "max_retries": 1, **more}
            manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
            return lm_eval.simple_evaluate(
                kind, model_args=model, tasks=[task], task_manager=manager, apply_chat_template=chat, log_samples=True,
                bootstrap_iters=0,
            )  # fmt: skip

        yield run


def test_scored_choices_are_those_that_the_model_itself_scores(evaluate, generator):
    tokenizer = str(demo_model_path())
    done = evaluate("local-completions", "/v1/completions", "hybrimoe_choose", tokenizer=tokenizer, num_concurrent=2)
    samples = done["samples"]["hybrimoe_choose"]
    assert len(samples) == len(QUESTIONS)
    assert 0 <= done["results"]["hybrimoe_choose"]["acc,none"] <= 1
    for sample in samples[:4]:
        for choice, (logprob, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            assert float(logprob) == pytest.approx(score(generator, sample["doc"]["question"], choice), abs=2e-3)


def score(generator, question, choice):
    """Log probability of a choice after a question, by the model's own forward."""
    import torch

    texts = (question, question + choice)  # lm_eval adds no special tokens
    before, whole = (generator.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    with torch.inference_mode():
        logits = generator.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.mark.parametrize(
    ("kind", "path", "chat"),
    [
        ("local-completions", "/v1/completions", False),
        ("local-chat-completions", "/v1/chat/completions", True),
    ],
)
def test_generated_answers_are_those_of_the_server(evaluate, kind, path, chat):
    done = evaluate(kind, path, "hybrimoe_continue", chat=chat, tokenizer=str(demo_model_path()))
    samples = done["samples"]["hybrimoe_continue"]
    assert len(samples) == len(QUESTIONS)
    assert all(sample["resps"][0][0] for sample in samples)
    said = {(sample["doc"]["question"], sample["resps"][0][0]) for sample in samples}
    assert len(said) == len({one["question"] for one in QUESTIONS}), "each question has the same reply each time"
    assert len({reply for _, reply in said}) > 1
