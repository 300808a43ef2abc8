"""`hybrimoe bench attention`."""

import json

import torch


def test_rows_hold_both_times_for_each_context(hybrimoe):
    result = hybrimoe("bench", "attention", "--context", "3", "--context", "300", "--rounds", "2", "--json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)["rows"]
    assert [row["context"] for row in rows] == [3, 300]
    for row in rows:
        assert len(row["ours_us"]["rounds"]) == len(row["torch_us"]["rounds"]) == 2
        assert row["gb_per_s"] > 0
    assert "torch / ours" in hybrimoe("bench", "attention", "--context", "3", "--rounds", "1").out


def test_heads_that_the_kernel_does_not_take_are_told(hybrimoe):
    odd = hybrimoe("bench", "attention", "--heads", "6", "--kv-heads", "4")
    assert (odd.code, "6 are no multiple of 4" in " ".join(odd.err.split())) == (2, True)
    size = hybrimoe("bench", "attention", "--head-size", "20")
    assert (size.code, "found 20" in " ".join(size.err.split())) == (2, True)


def test_a_wrong_result_is_not_timed(hybrimoe, monkeypatch):
    from hybrimoe.bench import attention as attention_bench

    monkeypatch.setattr(attention_bench, "decode_attention", lambda q, *_: torch.zeros_like(q))
    result = hybrimoe("bench", "attention", "--context", "8")
    assert (result.code, "ours deviates from float64" in " ".join(result.err.split())) == (1, True)
