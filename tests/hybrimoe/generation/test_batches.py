"""Padded batches of an injected model: the tokens of single runs, nothing computed for padding, jobs that can stop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import hybrimoe
from hybrimoe.errors import ConfigError, PromptError
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.batch.generate import BatchPrompt, generate_batch, new_tokens, probe_batch
from hybrimoe.generation.batch.job import BatchJob, job_prompts
from hybrimoe.generation.batch.padding import left_padded
from hybrimoe.generation.batch.prompts_file import PromptLine
from hybrimoe.generation.prefix.blocks import PrefixTree

TEXTS = ("a rather long prompt of forty characters", "short", "of a middling length", "b", "another short one")
GREEDY = SamplingOptions(temperature=0.0, max_new_tokens=10)


def never():
    return False


@pytest.fixture(scope="module")
def injected(tiny_model, byte_tokenizer):
    injection = hybrimoe.inject(tiny_model, accelerator="emulated", gpu_expert_slots=3, expert_dtype="float32")
    yield TextGenerator(tiny_model, byte_tokenizer), injection.session
    injection.restore()


@pytest.fixture
def generator(injected):
    return injected[0]


def prompts_of(generator, texts=TEXTS):
    return [BatchPrompt(tuple(generator.encode(text))) for text in texts]


def single(generator, prompt, options=GREEDY):
    own = options if prompt.max_new_tokens is None else replace(options, max_new_tokens=prompt.max_new_tokens)
    reply = generator.reply(prompt.token_ids, own)
    "".join(reply)
    return reply.text, tuple(reply.token_ids), reply.finish_reason


def test_padding_is_on_the_left_and_repeats_the_first_token():
    ids, mask = left_padded([[5, 6, 7], [8, 9]])
    assert ids.tolist() == [[5, 6, 7], [8, 8, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_replies_are_those_of_single_runs(generator, penalty):
    options = replace(GREEDY, repetition_penalty=penalty)
    prompts = prompts_of(generator)
    got = generate_batch(generator, prompts, options, never)
    assert [(r.text, r.token_ids, r.finish_reason) for r in got] == [single(generator, p, options) for p in prompts]


def test_each_reply_has_its_own_length_and_stop_text(generator):
    prompts = [replace(p, max_new_tokens=n) for p, n in zip(prompts_of(generator), (3, 9, 1, 6, 10), strict=True)]
    got = generate_batch(generator, prompts, GREEDY, never)
    assert [len(reply.token_ids) for reply in got] == [3, 9, 1, 6, 10]
    assert [(r.text, r.token_ids, r.finish_reason) for r in got] == [single(generator, p) for p in prompts]
    text = next(reply.text for reply in got if len(reply.text) > 4)
    stopping = replace(GREEDY, stop=(text[2:4],))
    again = generate_batch(generator, prompts, stopping, never)
    assert "stop" in {reply.finish_reason for reply in again}
    assert [(r.text, r.finish_reason) for r in again] == [
        (text, why) for text, _, why in (single(generator, p, stopping) for p in prompts)
    ]


def test_padding_and_ended_replies_reach_no_expert(injected):
    generator, session = injected
    prompts = [replace(p, max_new_tokens=n) for p, n in zip(prompts_of(generator), (1, 2, 3, 4, 5), strict=True)]
    activated = []
    run = session.run_layer

    def spy(layer, hidden, index, weights):
        activated.append((layer, int((index >= 0).all(dim=1).sum())))
        return run(layer, hidden, index, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "run_layer", spy)
        generate_batch(generator, prompts, GREEDY, never)
    of_layer_0 = [rows for layer, rows in activated if layer == 0]
    assert of_layer_0 == [sum(len(p.token_ids) for p in prompts), 4, 3, 2, 1]


def test_end_of_sequence_ends_one_reply_and_not_the_others(generator):
    prompts = prompts_of(generator)
    free = generate_batch(generator, prompts, GREEDY, never)
    eos = free[0].token_ids[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator.model.generation_config, "eos_token_id", eos)
        ended = generate_batch(generator, prompts, GREEDY, never)
        singles = [single(generator, p) for p in prompts]
    assert ended[0].finish_reason == "eos"
    assert len(ended[0].token_ids) <= 4
    assert [(r.text, r.token_ids, r.finish_reason) for r in ended] == singles


def test_sampling_with_a_seed_repeats_and_leaves_torch_alone(generator):
    options = SamplingOptions(temperature=1.0, seed=5, max_new_tokens=6)
    before = torch.random.get_rng_state()
    first = generate_batch(generator, prompts_of(generator), options, never)
    assert torch.equal(before, torch.random.get_rng_state())
    assert generate_batch(generator, prompts_of(generator), options, never) == first


def test_a_stopped_batch_keeps_what_there_is(generator):
    steps = []
    prompts = [replace(p, max_new_tokens=n) for p, n in zip(prompts_of(generator), (1, 9, 9, 9, 9), strict=True)]
    got = generate_batch(generator, prompts, GREEDY, lambda: len(steps) == 3, lambda: steps.append(1))
    assert [reply.finish_reason for reply in got] == ["length"] + ["interrupted"] * 4
    assert [len(reply.token_ids) for reply in got] == [1, 3, 3, 3, 3]
    assert got[1].token_ids == single(generator, prompts[1])[1][:3]


def test_the_context_bounds_a_reply(generator):
    prompt = BatchPrompt(tuple([65] * 125))
    assert new_tokens(generator, prompt, GREEDY) == 3
    reply = generate_batch(generator, [prompt, *prompts_of(generator)], GREEDY, never)[0]
    assert (len(reply.token_ids), reply.finish_reason) == (3, "context")


def test_routes_of_prompts_do_not_depend_on_what_they_are_padded_with(generator):
    prompts = prompts_of(generator)
    together = probe_batch(generator, prompts)
    assert together.shape == (5, 2, 4)
    assert together.sum(axis=-1) == pytest.approx(2.0), "top-2: every token has two experts"
    for at, prompt in enumerate(prompts):
        assert probe_batch(generator, [prompt])[0] == pytest.approx(together[at])


def test_routes_need_replaced_experts(byte_tokenizer, tiny_model, injected):
    plain = TextGenerator(tiny_model, byte_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrimoe.experts.module.HybridExperts", type("Other", (), {}))
        with pytest.raises(ConfigError, match="experts were replaced"):
            probe_batch(plain, prompts_of(plain))


def test_ignore_eos_is_refused(generator):
    with pytest.raises(ConfigError, match="ignore_eos"):
        generate_batch(generator, prompts_of(generator), replace(GREEDY, ignore_eos=True), never)


def run_job(injected, lines, batching, size, stop=never):
    generator, session = injected
    job = BatchJob(generator, session, lines, job_prompts(generator, lines, "p.txt"), GREEDY, batching, size)
    progress = []
    totals = job.run(stop, lambda result: None, lambda done, total, what: progress.append((done, total, what)))
    return totals, progress


def test_prompts_one_by_one_compute_what_they_begin_with_alike_once(injected):
    generator, session = injected
    tree = PrefixTree(generator.model, 1 << 30)
    lines = [PromptLine(at, TEXTS[0] + text) for at, text in enumerate((" a", " b", " c"), start=1)]
    prompts = job_prompts(generator, lines, "p.txt")
    job = BatchJob(generator, session, lines, prompts, GREEDY, "none", 1, prefixes=tree)
    totals = job.run(never, lambda result: None, lambda done, total, what: None)
    for prompt, result in zip(prompts, totals.results, strict=True):
        assert (result.reply.text, result.reply.token_ids) == single(generator, prompt)[:2]
    assert (tree.n_hits, tree.n_misses) == (2, 1)


@pytest.mark.parametrize("batching", ["none", "expertflow", "moe-lightning"])
def test_a_job_gives_every_prompt_its_reply(injected, batching):
    lines = [PromptLine(at, text) for at, text in enumerate(TEXTS, start=1)]
    totals, progress = run_job(injected, lines, batching, 2)
    assert totals.n_batches == totals.n_run == 3
    assert progress[-1] == (5, 5, "prompts")
    assert ((5, 5, "routes") in progress) == (batching == "expertflow")
    for result in totals.results:
        expected = single(injected[0], BatchPrompt(tuple(injected[0].encode(result.line.text))))
        assert (result.reply.text, result.reply.token_ids) == expected[:2]
    assert totals.new_tokens == 50
    assert 0 <= totals.grouping_us < totals.total_us
    if batching == "expertflow":
        assert totals.expected_distinct <= totals.expected_distinct_in_order + 1e-9


def test_urgent_prompts_run_first_and_deadlines_are_told(injected):
    lines = [PromptLine(1, "later"), PromptLine(2, "soon", priority=1), PromptLine(3, "at once", deadline_ms=1e-3)]
    totals, _ = run_job(injected, lines, "none", 1)
    assert [result.line.line for result in totals.results] == [2, 3, 1]
    assert [result.late for result in totals.results] == [False, True, False]
    ended = [result.ended_us for result in totals.results]
    assert ended == sorted(ended)


def test_a_stopped_job_keeps_what_has_ended(injected):
    lines = [PromptLine(at, text) for at, text in enumerate(TEXTS, start=1)]
    asked = iter(range(1000))
    totals, _ = run_job(injected, lines, "none", 2, lambda: next(asked) > 15)
    assert 0 < len(totals.results) < 5
    assert totals.n_run < totals.n_batches
    assert totals.results[0].reply.finish_reason == "length"
    assert totals.results[-1].reply.finish_reason == "interrupted"


def test_a_prompt_without_room_is_refused_with_its_line(generator):
    with pytest.raises(PromptError, match=r"p\.txt:7: the prompt has 128 tokens"):
        job_prompts(generator, [PromptLine(7, "x" * 128)], "p.txt")


def test_the_seed_of_grouping_is_the_job_s(injected):
    lines = [PromptLine(at, text) for at, text in enumerate(TEXTS, start=1)]
    first, again = run_job(injected, lines, "expertflow", 2)[0], run_job(injected, lines, "expertflow", 2)[0]
    assert np.array_equal([r.batch for r in first.results], [r.batch for r in again.results])
