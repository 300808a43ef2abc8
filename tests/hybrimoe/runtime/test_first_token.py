"""Nothing is compiled in the first reply: a user waits for that behind a progress bar, not for a token."""

import pytest

from tests.forked import Forked

SCRIPT = """
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

model = hybrimoe.load(None, accelerator=sys.argv[1], lookahead=int(sys.argv[2]), progress=False)
generator = TextGenerator(model, load_tokenizer(None))
before = compiled()
"".join(generator.reply(generator.encode("It was a bright morning"), SamplingOptions(max_new_tokens=12)))
print(sorted(compiled() - before))
"""


@pytest.mark.parametrize(("accelerator", "lookahead"), [("emulated", 3), ("emulated", 0), ("none", 3)])
def test_the_first_reply_compiles_nothing(accelerator: str, lookahead: int) -> None:
    with Forked(SCRIPT, accelerator, str(lookahead)) as program:
        found, errors = program.communicate()
        assert program.returncode == 0, errors
    assert found.strip() == "[]"
