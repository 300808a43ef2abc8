"""Nothing is compiled in the first reply: a user waits for that behind a progress bar, not for a token."""

import json
from typing import Any

import pytest

from tests.forked import Forked

SCRIPT = """
import json
import sys
import hybrimoe
from numba.core.dispatcher import Dispatcher
from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.generation import SamplingOptions, TextGenerator

def compiled():
    ours = ("hybrimoe", "cpu_kernels", "scheduler", "gpu_kernels")
    modules = [m for name, m in list(sys.modules.items()) if name.split(".")[0] in ours]
    found = {id(d): d for m in modules for d in list(vars(m).values()) if isinstance(d, Dispatcher)}
    return {(d.py_func.__module__, d.py_func.__name__, str(s)) for d in found.values() for s in d.signatures}

model = hybrimoe.load(None, progress=False, **json.loads(sys.argv[1]))
generator = TextGenerator(model, load_tokenizer(None))
before = compiled()
for text in ("It was a bright morning", "It was a bright morning. " * 20):
    "".join(generator.reply(generator.encode(text), SamplingOptions(max_new_tokens=12)))
print(sorted(compiled() - before))
"""


EMULATED, ALONE = ({"accelerator": name, "expert_dtype": "bfloat16"} for name in ("emulated", "none"))
TIERED = {"memory.host": 24, "memory.disk": "auto"}


@pytest.mark.parametrize(
    "settings",
    [
        EMULATED, EMULATED | {"lookahead": 0}, EMULATED | TIERED,
        EMULATED | {"lossy": "hobbit"}, EMULATED | {"lossy": "defer"}, ALONE | {"lossy": "skip"},
        ALONE, ALONE | {"step": "transformers"}, ALONE | TIERED, ALONE | TIERED | {"step": "transformers"},
        ALONE | {"kv_dtype": "int8"}, ALONE | {"backend": "torch"}, EMULATED | {"dense_dtype": "int8"},
        ALONE | {"dense_dtype": "int8", "step": "transformers"}, EMULATED | {"policy": "moe_infinity"},
        EMULATED | TIERED | {"policy": "hybrimoe"},
    ],
    ids=str,
)  # fmt: skip
def test_the_first_reply_compiles_nothing(settings: dict[str, Any]) -> None:
    with Forked(SCRIPT, json.dumps(settings)) as program:
        found, errors = program.communicate()
        assert program.returncode == 0, errors
    assert found.strip() == "[]"
