"""Every family's checkpoint on disk is streamed into the store; logits and weights are plain transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, prompt, tiny_model

from hybrimoe.checkpoint import load

pytestmark = pytest.mark.families

LOGIT_TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_family_loads(family: str, tmp_path: Path) -> None:
    plain = tiny_model(family)
    plain.save_pretrained(tmp_path)
    options = {"accelerator": "none", "expert_dtype": "float32", "policy": "static", "progress": False}
    model = load(tmp_path, packed_file=False, **options)
    assert model.hybrimoe.session.store.nbytes > 0
    with torch.no_grad():
        error = (model(input_ids=prompt()).logits - plain(input_ids=prompt()).logits).abs().max()
    assert float(error) <= LOGIT_TOLERANCE
    model.hybrimoe.restore()
    expected = plain.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])] == []
