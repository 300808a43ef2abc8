"""Which layers have experts, in each way that configurations say it; hardware profiles as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from yaml_rules.errors import YamlRulesError
from yaml_rules.hardware import load_hardware
from yaml_rules.shapes.derive import moe_layers


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, (0, 1, 2, 3)),
        ({"moe_layers": [1, 3]}, (1, 3)),
        ({"moe_layer_freq": [0, 1, 1, 0]}, (1, 2)),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "moe"]}, (1, 3)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [2]}, (0, 1, 3)),
        ({"first_k_dense_replace": 1}, (1, 2, 3)),
    ],
)
def test_each_convention(config: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert moe_layers(config, 4) == layers


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "is a mapping with cpu, accel, link")])
def test_a_hardware_file_that_is_no_profile(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(YamlRulesError, match=message):
        load_hardware(tmp_path / "machine.json")


def test_a_hardware_file_that_is_not_there() -> None:
    with pytest.raises(YamlRulesError, match=r"no hardware profile at gone\.json"):
        load_hardware("gone.json")
