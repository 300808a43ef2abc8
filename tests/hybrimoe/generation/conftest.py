"""A tiny random MoE model and a byte-level tokenizer for it, made once."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CONTEXT = 128


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token a byte, so that most characters outside ASCII are split over tokens."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def tiny_model(byte_tokenizer):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = Qwen3MoeConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    yield Qwen3MoeForCausalLM(config).eval()
    torch.set_num_threads(threads)
