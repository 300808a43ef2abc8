"""Padded batches of families that attend, route and keep their past in different ways: the tokens of single runs."""

import pytest
import torch
from tiny_families import tiny_model

import hybrimoe
from hybrimoe.errors import ConfigError
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.generation.batch.generate import BatchPrompt, generate_batch, probe_batch

FAMILIES = ("deepseek_v3", "ernie4_5_vl_moe", "gpt_oss", "inkling2", "jamba", "llama4", "qwen3_next")
"""Latent attention, experts for images, sliding windows, custom activation, Mamba, sorted tokens, linear attention."""


class Letters:
    """A tokenizer that only decodes, each token to a letter."""

    all_special_ids = ()

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(65 + token % 26)

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(chr(65 + token % 26) for token in ids)


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_replies_are_those_of_single_runs(family: str) -> None:
    model = tiny_model(family)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    generator, options = TextGenerator(model, Letters()), SamplingOptions(temperature=0.0, max_new_tokens=6)
    dice = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config().vocab_size
    prompts = [BatchPrompt(tuple(torch.randint(3, vocab, (n,), generator=dice).tolist())) for n in (20, 5, 11)]
    singles = []
    for prompt in prompts:
        reply = generator.reply(prompt.token_ids, options)
        "".join(reply)
        singles.append(tuple(reply.token_ids))
    assert [reply.token_ids for reply in generate_batch(generator, prompts, options, lambda: False)] == singles
    if family == "llama4":
        with pytest.raises(ConfigError, match="Llama4ForCausalLM does not show it"):
            probe_batch(generator, prompts)
    else:
        routes = probe_batch(generator, prompts)
        assert routes[1] == pytest.approx(probe_batch(generator, prompts[1:2])[0])
    injection.restore()
