"""The decode and prefill benchmarks: fair rounds, refusal of wrong numbers, and one real run of each."""

import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cpu_kernels.host.threads import resolve_threads
from hybrimoe.bench import rounds as harness
from hybrimoe.bench.model import contenders, gguf_file, parallel, sources, speculate
from hybrimoe.bench.model import measure as model_bench
from hybrimoe.bench.model.weights import gguf_step_bytes, step_bytes
from hybrimoe.cli.app import app
from hybrimoe.cli.bench import long_chat as long_chat_command
from hybrimoe.cli.bench import model_run
from hybrimoe.cli.bench import parallel as parallel_command
from hybrimoe.cli.bench import speculate as speculate_command
from hybrimoe.cli.views import render
from hybrimoe.config.deploy import load_config
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.errors import ConfigError, MissingExtraError, ModelError
from hybrimoe.generation import TextGenerator
from hybrimoe.machine.facts import machine


@pytest.fixture(scope="module", autouse=True)
def small_machine(tmp_path_factory, private_cache):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path_factory.mktemp("packed"))))
        yield
    torch.set_num_threads(threads)


def run(*words):
    result = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_rounds_alternate_each_begins_with_another_and_the_first_does_not_count():
    order = []
    counts = {"a": 0, "b": 0, "c": 0}

    def measure(name):
        order.append(name)
        counts[name] += 1
        return float(counts[name])

    values = harness.alternate({name: name for name in counts}, measure, 3)
    assert values == {name: [2.0, 3.0, 4.0] for name in counts}
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert harness.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [3.0, 1.0, 2.0]}


def test_rounds_end_early_with_one_that_counts_at_least():
    assert harness.alternate({"a": 1.0, "b": 2.0}, lambda value: value, 3, until=0.0) == {"a": [1.0], "b": [2.0]}


class Fake(contenders.Contender):
    """A contender whose logits are given."""

    def __init__(self, label, dtype, values):
        super().__init__(label, generator=None, dtype=dtype)
        self.values = np.asarray(values, np.float32)

    def logits(self, prompt_ids):
        return self.values


def test_wrong_logits_end_the_benchmark_and_right_ones_are_told():
    plain = Fake("transformers", None, [1.0, 2.0, 3.0])
    near, far = Fake("ours", "int4", [1.1, 2.0, 2.9]), Fake("broken", "int4", [3.0, -2.0, 1.0])
    cosines = contenders.check_parity([plain, near], [1])
    assert set(cosines) == {"ours"}
    assert 0.99 < cosines["ours"] < 1.0
    with pytest.raises(ModelError, match=r"broken: logits have a cosine of .* to transformers"):
        contenders.check_parity([plain, near, far], [1])
    with pytest.raises(ModelError, match="to ours"):
        contenders.check_parity([near, far], [1])
    with pytest.raises(ModelError, match="nan"):
        contenders.check_parity([plain, Fake("nan", "int4", [np.nan, 1.0, 1.0])], [1])
    with pytest.raises(ModelError):
        contenders.check_parity([plain, Fake("nearly", "float32", [1.1, 2.0, 2.9])], [1])


def test_decode_of_the_demo_model_side_by_side():
    words = ("decode", "--policy", "static", "--policy", "ours", "--rounds", "2", "-n", "2", "--prompt-tokens", "4")
    result = run(*words)
    names = [row["name"] for row in result["results"]]
    assert names == ["transformers", "static", "ours"]
    for row in result["results"]:
        assert len(row["tokens_per_s"]["rounds"]) == 2
        assert 0 < row["tokens_per_s"]["min"] <= row["tokens_per_s"]["median"] <= row["tokens_per_s"]["max"]
    plain, static, ours = result["results"]
    assert plain["provenance"] == "measured"
    assert plain["hit_rate"] is None
    assert ours["provenance"] == static["provenance"] == "measured, accelerator emulated"
    assert 0 <= ours["hit_rate"] <= 1
    assert ours["logits_cosine"] > 0.9
    assert result["machine"]["cpu"]


def test_random_weights_in_a_real_shape_need_no_checkpoint(monkeypatch):
    tiny = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 100}
    make = sources._config

    monkeypatch.setattr(sources, "_config", lambda shape, layers, replaced: make(shape, layers, tiny))
    result = run(
        "prefill", "--shape", "olmoe-1b-7b", "--layers", "2", "--no-plain", "--dtype", "int4", "--dtype", "float32",
        "--policy", "ours", "--accelerator", "none", "--rounds", "1", "--prompt-tokens", "12",
    )  # fmt: skip
    assert result["weights"] == "random"
    assert [row["name"] for row in result["results"]] == ["ours int4", "ours float32"]
    source = sources.RandomSource("olmoe-1b-7b", 2)
    config = load_config({"accelerator": "none", "cpu": {"expert_dtype": "float32"}})
    models = [source.hybrid(config, lambda *done: None) for _ in range(2)]
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        first, second = (model(input_ids=ids).logits for model in models)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    packed = source.hybrid(
        load_config({"accelerator": "none", "cpu": {"expert_dtype": "float32", "dense_dtype": "int8"}}),
        lambda *done: None,
    )
    assert isinstance(packed.model.layers[0].self_attn.q_proj, PackedLinear), "dense layers are as configured"
    with torch.inference_mode():
        logits = packed(input_ids=ids).logits
    assert not torch.equal(logits, first)
    assert torch.cosine_similarity(logits.double().flatten(), first.double().flatten(), dim=0) > 0.99
    plain = source.plain()
    assert type(plain.model.layers[0].mlp.experts).__name__ == "OlmoeExperts"
    with torch.inference_mode():
        logits = plain(input_ids=ids).logits
    assert torch.cosine_similarity(logits.double().flatten(), first.double().flatten(), dim=0) > 0.999, "same weights"
    for model in [*models, packed]:
        model.hybrimoe.session.close()


@pytest.mark.parametrize(
    ("words", "provenance"),
    [
        ([], "measured"),
        (["--accelerator", "emulated"], "measured, accelerator emulated"),
        (["--policy", "ours"], "measured, accelerator emulated"),
        (["--slots", "0.5"], "measured, accelerator emulated"),
        (["--slots", "0.5", "--accelerator", "none"], "measured"),
    ],
    ids=" ".join,
)
def test_a_shape_runs_as_a_model_of_it_would_unless_slots_are_asked_for(monkeypatch, words, provenance):
    """It ran as the demo model, whose lanes are emulated without a card: at half the speed that a user gets."""
    tiny = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 100}
    make = sources._config
    monkeypatch.setattr(sources, "_config", lambda shape, layers, replaced: make(shape, layers, tiny))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    given = ("decode", "--shape", "olmoe-1b-7b", "--layers", "1", "--no-plain", "--rounds", "1", "-n", "2", *words)
    (row,) = run(*given)["results"]
    assert row["provenance"] == provenance


def test_comparing_policies_sets_cache_off_beside_cache_on():
    request = model_bench.Request(
        kind="decode", model=None, shape=None, layers=None, policies=(), dtypes=("int4", "int8"), compare_policies=True,
        plain=False, gguf=None, prompt_tokens=8, new_tokens=2, rounds=1, slots=None,
        deploy=load_config,
    )  # fmt: skip
    labels = [label for label, _ in request.variants()]
    assert labels[:2] == ["cache off (CPU only) int4", "static int4"]
    assert "ours int8" in labels
    assert len(set(labels)) == len(labels) == 2 * (1 + len(model_bench.COMPARED_POLICIES))
    assert request.variants()[0][1]["slots"] == "0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decode", "--shape", "olmoe"), "did you mean 'olmoe-1b-7b'"),
        (("decode", "--shape", "olmoe-1b-7b", "--layers", "17"), "between 1 and 16"),
        (("decode", "--layers", "3"), "--layers goes with --shape"),
        (("decode", "model", "--shape", "olmoe-1b-7b"), "not both"),
        (("prefill", "--policy", "nope"), "nope"),
        (("prefill", "--rounds", "0"), "--rounds"),
        (("decode", "--kv-dtype", "int9"), "int9"),
        (("decode", "--llama-kv", "q8_0"), "--llama-kv goes with --llama-cpp or --gguf"),
        (("decode", "--llama-cpp", "--llama-kv", "q8"), "did you mean 'q8_0'"),
        (("decode", "--llama-cpp", "--llama-weights", "f16"), "f16"),
    ],
)
def test_wrong_usage_is_told(words, message):
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_keys_and_values_of_several_dtypes_side_by_side():
    result = run(
        "decode", "--kv-dtype", "bfloat16", "--kv-dtype", "int8", "--accelerator", "none", "--rounds", "1", "-n", "2",
        "--prompt-tokens", "4", "--no-plain",
    )  # fmt: skip
    assert [row["name"] for row in result["results"]] == [
        "as configured, bfloat16 keys and values", "as configured, int8 keys and values",
    ]  # fmt: skip


class FakeLlama:
    """As far as rounds go: what it was told to compute, and how often to begin anew."""

    ctx, n_tokens = None, 0

    def __init__(self, hybrid):
        self._is_hybrid, self.done = hybrid, []

    def n_vocab(self):
        return 50

    def reset(self):
        self.done.append("reset")

    def eval(self, tokens):
        self.done.append(len(tokens))


@pytest.mark.parametrize(("hybrid", "n_prompts"), [(False, 1), (True, 3)])
def test_llama_cpp_computes_a_prompt_again_where_no_earlier_state_is_left(monkeypatch, hybrid, n_prompts):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=lambda **_: FakeLlama(hybrid)))
    monkeypatch.setattr(contenders, "gguf_step_bytes", lambda path: None)
    monkeypatch.setattr(contenders.LlamaCpp, "greedy", lambda _: 3)
    peer = contenders.LlamaCpp("a", 1, 8)
    for _ in range(3):
        peer.decode([1, 2, 3, 4], 2)
    assert [peer.llama.done.count(what) for what in ("reset", 3, 1)] == [n_prompts, n_prompts, 9]


def test_llama_cpp_stores_keys_and_values_as_asked_for(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=lambda **options: opened.append(options)))
    monkeypatch.setattr(contenders, "gguf_step_bytes", lambda path: None)
    made = [contenders.LlamaCpp("a", 1, 8), contenders.LlamaCpp("a", 1, 8, flash=True)]
    made += [contenders.LlamaCpp("a", 1, 8, kv=kv) for kv in ("q8_0", "q4_0")]
    assert [(o["type_k"], o["type_v"], o["flash_attn"]) for o in opened] == [
        (None, None, False), (None, None, True), (8, 8, True), (2, 2, True),
    ]  # fmt: skip
    assert len({each.label for each in made}) == len(made)
    assert set(model_run.LLAMA_KV) == {*contenders.LLAMA_KV, "f16-flash"}
    assert set(model_run.LLAMA_WEIGHTS) == set(gguf_file.WEIGHTS)


def test_llama_cpp_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtraError, match="llama-cpp-python"):
        contenders.LlamaCpp("model.gguf", 1, 8)


def test_the_same_weights_for_llama_cpp_need_a_shape():
    result = CliRunner().invoke(app, ["bench", "decode", "--llama-cpp", "--no-plain", "--quick"])
    assert result.exit_code == 2
    assert "--llama-cpp goes with --shape" in " ".join(result.stderr.split())


def test_random_weights_as_a_gguf_file_hold_what_the_hybrid_model_holds(tmp_path):
    gguf = pytest.importorskip("gguf")
    source = sources.RandomSource("olmoe-1b-7b", 1)
    source.config.update({"vocab_size": 256, "hidden_size": 128, "intermediate_size": 64, "num_experts": 8})
    source.gguf(tmp_path / "tiny.gguf", lambda *_: None)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    q4_0 = (source.config.num_experts_per_tok * 3 * 128 * 64 + 4 * 128 * 128) * 18 // 32
    q8_0, float32 = 256 * 128 * 34 // 32, 4 * (8 * 128 + 5 * 128)
    assert gguf_step_bytes(tmp_path / "tiny.gguf") == q4_0 + q8_0 + float32
    source.gguf(tmp_path / "bf16.gguf", lambda *_: None, weights="bf16")
    assert gguf_step_bytes(tmp_path / "bf16.gguf") == 2 * (q4_0 * 32 // 18 + 256 * 128) + float32
    model = source.hybrid(load_config({}, accelerator="none", expert_dtype="float32"), lambda *_: None)
    store = model.hybrimoe.session.store
    try:
        for part in ("gate", "up", "down"):
            tensor = read[f"blk.0.ffn_{part}_exps.weight"]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for expert in range(8):
                exact = getattr(store.read(0, expert), part).numpy()
                assert np.abs(values[expert] - exact).max() <= np.abs(exact).max() / 8 + 1e-6
        norm = read["output_norm.weight"].data
        assert np.array_equal(norm, model.model.norm.weight.detach().float().numpy())
    finally:
        model.hybrimoe.session.close()


def test_the_table_says_what_is_emulated(monkeypatch):
    rows = [
        {"name": "transformers", "provenance": "measured", "tokens_per_s": harness.spread([10.0]), "hit_rate": None,
         "prefetch_precision": None, "logits_cosine": None, "resident_mib": 900.0, "of_read_rate": 0.2},
        {"name": "ours", "provenance": "measured, accelerator emulated", "tokens_per_s": harness.spread([25.0]),
         "hit_rate": 0.5, "prefetch_precision": 0.8, "logits_cosine": 0.99, "resident_mib": 400.0, "of_read_rate": 0.5},
    ]  # fmt: skip
    told = io.StringIO()
    monkeypatch.setattr(render, "out", lambda: Console(file=told, width=80))
    model_run.show({"bench": "decode", "model": "demo", "weights": "checkpoint", "prompt_tokens": 8, "rounds": 1,
                        "threads": 2, "machine": machine(), "results": rows})  # fmt: skip
    text = told.getvalue()
    assert "2.50x" in text
    assert "the accelerator is emulated" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_columns_that_nobody_has_are_left_out(monkeypatch):
    row = {"name": "ours", "provenance": "measured", "tokens_per_s": harness.spread([10.0]), "hit_rate": None,
           "prefetch_precision": None, "logits_cosine": None, "resident_mib": 900.0, "of_read_rate": None}  # fmt: skip
    told = io.StringIO()
    monkeypatch.setattr(render, "out", lambda: Console(file=told, width=80))
    model_run.show({"bench": "prefill", "model": "demo", "weights": "checkpoint", "prompt_tokens": 8, "rounds": 1,
                        "threads": 2, "machine": machine(), "results": [row]})  # fmt: skip
    assert "MiB" in told.getvalue()
    assert all(title not in told.getvalue() for title in ("hits", "prefetch", "cosine", "read rate"))


def test_a_peer_gets_as_many_threads_as_we_do():
    def deploy(**overrides):
        return load_config({"cpu": {"threads": 1}}, **overrides)

    request = model_bench.Request(
        kind="decode", model=None, shape=None, layers=None, policies=(), dtypes=(), compare_policies=False,
        plain=False, gguf=None, prompt_tokens=8, new_tokens=2, rounds=1, slots=None, deploy=deploy,
    )  # fmt: skip
    assert request.threads == 1
    assert dataclasses.replace(request, deploy=load_config).threads == resolve_threads()


def test_step_bytes_count_what_a_token_reads():
    """An OLMoE of 1 layer: experts that a token visits, attention, norms, routers and the output layer."""
    source = sources.RandomSource("olmoe-1b-7b", 1)
    config = source.config
    hidden, inter = config.hidden_size, config.intermediate_size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    attention = sum(parameter.numel() for parameter in model.model.layers[0].self_attn.parameters())
    router, norms = config.num_experts * hidden, 3 * hidden
    experts = config.num_experts_per_tok * 3 * hidden * inter
    expected = 2 * (attention + router + norms + experts + config.vocab_size * hidden)
    assert step_bytes(model) == expected


def test_a_longer_prompt_than_the_shape_knows_is_measured_all_the_same():
    assert sources.RandomSource("olmoe-1b-7b", 1, 9000).config.max_position_embeddings == 9001
    assert sources.RandomSource("olmoe-1b-7b", 1, 10).config.max_position_embeddings == 4096


def test_a_config_that_is_no_shape_is_refused():
    with pytest.raises(ConfigError, match="unknown model shape"):
        sources.RandomSource("no-such-shape", None)


def test_a_shape_is_measured_with_other_numbers_of_experts():
    result = run(
        "prefill", "--shape", "olmoe-1b-7b", "--layers", "1", "--experts", "2", "--active", "1", "--no-plain",
        "--dtype", "int4", "--accelerator", "none", "--rounds", "1", "--prompt-tokens", "4",
    )  # fmt: skip
    assert (result["layers"], result["experts"], result["active"]) == (1, 2, 1)
    assert sources.other_experts("olmoe-1b-7b", None, None) == {}
    replaced = sources.other_experts("deepseek-v2-lite", 128, 3)
    assert replaced == {"n_routed_experts": 128, "num_experts_per_tok": 3}
    config = sources.RandomSource("deepseek-v2-lite", 2, replaced=replaced).config
    assert (config.n_routed_experts, config.num_experts_per_tok) == (128, 3)


@pytest.mark.parametrize(
    ("shape", "words", "said"),
    [
        ("olmoe-1b-7b", ["--experts", "4"], "a token cannot take 8 of 4 experts"),
        ("olmoe-1b-7b", ["--active", "65"], "a token cannot take 65 of 64 experts"),
        ("deepseek-v3", ["--experts", "100"], "n_group"),
        (None, ["--experts", "4"], "--experts goes with --shape"),
        (None, ["--active", "4"], "--active goes with --shape"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_refused(shape, words, said):
    given = ["--shape", shape, "--layers", "4"] if shape else []
    done = CliRunner().invoke(app, ["bench", "decode", *given, *words, "--no-plain", "--accelerator", "none"])
    assert done.exit_code in (1, 2)
    assert said in " ".join(done.output.split())


def test_lossy_policies_stand_beside_each_policy_and_are_not_judged_by_their_logits():
    request = model_bench.Request(
        kind="decode", model=None, shape=None, layers=None, policies=("ours", "static"), dtypes=(),
        compare_policies=False, plain=False, gguf=None, prompt_tokens=8, new_tokens=2, rounds=1, slots=None,
        deploy=load_config, lossy=("skip",),
    )  # fmt: skip
    assert [label for label, _ in request.variants()] == ["ours", "ours + skip", "static", "static + skip"]
    assert request.variants()[1][1] == {"policy": "ours", "slots": None, "dtype": None, "lossy": "skip"}

    class Fixed(contenders.Contender):
        def logits(self, prompt_ids):
            return np.array([1.0, 0.0] if self.label != "lossy" else [0.0, 1.0], np.float32)

    exact = [Fixed(label, None, None, "int4") for label in ("first", "second")]
    cosines = contenders.check_parity([Fixed("lossy", None, None, "int4", lossy=True), *exact], [1])
    assert cosines == {"second": 1.0}


def test_a_reply_without_a_tokenizer_has_no_text() -> None:
    from hybrimoe.bench.model.sources import NoTokenizer
    from hybrimoe.generation.detokenise import IncrementalDecoder

    assert IncrementalDecoder(NoTokenizer(), [1, 2]).push(3) == ""


def test_decode_shows_where_the_time_goes(capsys):
    words = ("decode", "--accelerator", "none", "--no-plain", "--new-tokens", "6", "--rounds", "1", "--profile")
    result = run(*words)
    (row,) = result["results"]
    assert row["profile"]["prefill"]["tokens"] == 32
    assert row["profile"]["decode"]["tokens"] == 6
    model_run.show(result)
    assert "part of a token's time" in capsys.readouterr().out


def test_speculation_is_measured_on_two_texts(capsys):
    result = run("speculate", "--new-tokens", "12", "--rounds", "1", "--dtype", "int8")
    assert [row["tokens"] for row in result["steps"]] == [1, 2, 3, 4]
    assert result["steps"][0]["pays_from"] is None
    assert [text["text"] for text in result["texts"]] == ["copying", "free"]
    assert all(text["drafts"]["steps"] + text["drafts"]["steps_saved"] == 11 for text in result["texts"])
    speculate_command.show(result)
    assert "pays from an acceptance of" in capsys.readouterr().out


def test_replies_side_by_side_are_measured_and_compared_with_each_alone(capsys):
    result = run("parallel", "-r", "1", "-r", "3", "--new-tokens", "10", "--rounds", "1", "--dtype", "int8")
    one, three = result["rows"]
    assert (one["replies"], three["replies"]) == (1, 3)
    assert result["in_turn"] is None
    assert one["gain"] == 1.0
    assert one["experts"] < three["experts"] <= 3 * one["experts"]
    assert sum(three["parts"].values()) == pytest.approx(1.0)
    parallel_command.show(result)
    assert "every reply is the one it is alone" in " ".join(capsys.readouterr().out.split())


def test_a_second_turn_is_measured_by_where_the_first_one_is_kept(capsys, tmp_path):
    words = ("--context", "80", "--turn-tokens", "5", "--new-tokens", "4", "--rounds", "1", "--folder", tmp_path)
    result = run("long-chat", *map(str, words))
    kept = 80 + 4 - 1
    turns = [(row["turn"].split(", ")[-1], row["reused"], row["from_disk"]) for row in result["rows"]]
    assert turns == [
        ("first", 0, 0),
        ("own cache", kept, 0),
        ("from memory", kept, 0),
        ("from disk", kept, kept),
    ]
    assert all(row["ttft_ms"]["median"] > 0 < row["tiers"]["disk"] for row in result["rows"])
    long_chat_command.show(result)
    table = capsys.readouterr().out
    for words in ("first", "own cache", "from memory", "from disk"):
        assert f" {words} " in table, "in one line of 80 columns"
    assert list(tmp_path.iterdir()) == []


def test_a_reply_that_its_batch_changes_ends_the_benchmark(monkeypatch):
    own = TextGenerator.forward_each

    def swapped(self, tokens, caches):
        logits = own(self, tokens, caches)
        return logits.flip(0)

    monkeypatch.setattr(TextGenerator, "forward_each", swapped)
    deployment = load_config({}, accelerator="none", expert_dtype="int8")
    with pytest.raises(ModelError, match="is another one than alone"):
        parallel.measure(parallel.Request(None, None, None, deployment, (2,), 10, 1), lambda *_: None)


def test_an_acceptance_that_pays_for_a_longer_step():
    assert speculate._break_even(0, 1.0) is None
    assert speculate._break_even(1, 2.5) is None
    assert speculate._break_even(1, 1.25) == pytest.approx(0.25)
    assert speculate._break_even(3, 1.875) == pytest.approx(0.5)
