"""What generation_config.json asks for and a streamed reply does not do is said once, when the model is opened."""

from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from hybrimoe.generation import TextGenerator
from hybrimoe.generation.decoding import GenerationConfigWarning, other_decoding


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, {}),
        ({"do_sample": True, "top_k": 20, "temperature": 0.7, "repetition_penalty": 1.1}, {}),
        ({"num_beams": 1, "num_return_sequences": 1}, {}),
        ({"num_beams": 4}, {"num_beams": 4}),
        ({"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 4, "num_return_sequences": 2}),
        ({"penalty_alpha": 0.6, "top_k": 4}, {"penalty_alpha": 0.6}),
    ],
)
def test_which_fields_ask_for_another_decoding(fields: dict[str, Any], named: dict[str, Any]) -> None:
    assert other_decoding(GenerationConfig(**fields)) == named


def test_it_is_said_when_the_model_is_opened(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "generation_config", GenerationConfig(num_beams=4))
    with pytest.warns(GenerationConfigWarning, match=r"asks for num_beams 4; .*model.generate follows it"):
        TextGenerator(tiny_model, byte_tokenizer)
