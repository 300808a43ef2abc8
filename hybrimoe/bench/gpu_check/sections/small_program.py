"""A small use of an accelerator, for tools that watch every access: `python -m ...small_program cuda:0 auto`."""

from __future__ import annotations

import sys
from dataclasses import replace

from hybrimoe.bench.gpu_check.sections.models import cosine, forced_logits, opened, prompt
from hybrimoe.bench.gpu_check.setting import SMALL_MODEL, Setting
from hybrimoe.errors import ModelError

LEAST_COSINE = 0.9999
N_TOKENS = 3


def main(accelerator: str, step: str) -> None:
    """A small model's prompt and some tokens, with fewer slots than experts. step: as
    `cpu.step`. Raises ModelError for wrong logits."""
    setting = replace(Setting(accelerator, ""), smaller=SMALL_MODEL, prompt_tokens=40)
    ids = prompt(setting)
    tokens = ids[:N_TOKENS]
    with opened(setting, "none", "float32") as reference:
        wanted = forced_logits(reference, ids, tokens)
    with opened(setting, accelerator, "float32", policy="on_demand/none/lru", share=0.5, step=step) as model:
        found = forced_logits(model, ids, tokens)
    worst = min(map(cosine, found, wanted))
    if not worst >= LEAST_COSINE:
        raise ModelError(f"logits of {accelerator} have a cosine of {worst:.5f} to the CPU's, expected {LEAST_COSINE}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
