"""`hybrimoe bench kv`, and what `plan` says of keys and values."""

from __future__ import annotations

import json
from typing import Any


def test_a_row_for_each_dtype(hybrimoe: Any) -> None:
    options = ["--quick", "--rounds", "1", "--dtype", "int4", "--context", "300", "--kv-dtype", "int8"]
    result = hybrimoe("bench", "kv", *options, "--json")
    assert result.code == 0, result.err
    own, int8 = json.loads(result.out)["rows"]
    assert (own["dtype"], int8["dtype"]) == ("bfloat16", "int8")
    assert 0.5 < int8["token_bytes"] / own["token_bytes"] < 0.6
    assert own["attention_error"] < 1e-2 < 5e-2 > int8["attention_error"] > 0
    assert own["logit_cosine"] > 0.999
    assert int8["logit_cosine"] > 0.98
    assert 0.9 < int8["perplexity"] / own["perplexity"] < 1.1
    assert int8["times"][0]["ms"]["median"] > int8["times"][0]["attention_ms"]["median"] > 0


def test_the_plan_tells_what_a_token_takes() -> None:
    from hybrimoe.checkpoint.meta import model_shape, with_kv_dtype

    olmoe = model_shape("olmoe-1b-7b")
    assert olmoe.kv_bytes == 2 * 16 * 2 * 128
    taken = {name: with_kv_dtype(olmoe, "olmoe-1b-7b", name).kv_bytes for name in ("bfloat16", "int8", "int4")}
    assert taken == {"bfloat16": olmoe.kv_bytes, "int8": 2 * 16 * 132, "int4": 2 * 16 * 72}
    latent = with_kv_dtype(model_shape("deepseek-v2-lite"), "deepseek-v2-lite", "int8")
    assert latent.kv_bytes == 512 + 4 + 64 + 4
