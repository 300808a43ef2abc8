"""What the commands import, and what they leave out of it."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc, sys
from hybrimoe.cli.shared.libraries import RUNS_MODELS, import_libraries
import_libraries("json.tool")
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
assert {*RUNS_MODELS, "json.tool"} <= set(sys.modules)
assert "scipy.optimize" not in sys.modules
import transformers
from transformers.utils import import_utils
assert import_utils.define_import_structure.__module__ == import_utils.__name__
assert import_utils.is_torch_distributed_available.__module__ == import_utils.__name__
assert transformers.utils.is_scipy_available is import_utils.is_scipy_available
import transformers.masking_utils
assert "torch._dynamo.symbolic_convert" not in sys.modules
frozen = gc.get_freeze_count()
import_libraries("json.tool")
assert gc.get_freeze_count() == frozen
"""

COMPILES = """
from hybrimoe.compat import import_masks_alone, leave_dynamo_out
leave_dynamo_out()
import torch
import_masks_alone()
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
torch.empty(2, device="meta").normal_()
import sys
assert "torch._dynamo.symbolic_convert" not in sys.modules
assert torch.compiler.disable(len)("ab") == 2
assert torch.compiler.disable(reason="a test")(len)("ab") == 2
from torch._dynamo import config
assert config is torch._dynamo.config
twice = torch.compile(lambda x: 2 * x, backend="eager")
assert twice(torch.ones(1)).item() == 2
assert sys.modules["torch._dynamo"]._trace_wrapped_higher_order_op.TransformGetItemToIndex is TransformGetItemToIndex
from torch._dynamo.variables import tensor
assert tensor.trace_wrapped is sys.modules[TransformGetItemToIndex.__module__].trace_wrapped
assert torch.compiler.disable(lambda: 1) != 1
leave_dynamo_out()
assert "torch._dynamo.symbolic_convert" in sys.modules
"""


BY_NAME = """
from hybrimoe.compat import leave_dynamo_out
leave_dynamo_out()
import torch
{statement}
import importlib, sys
module = sys.modules["{module}"]
assert module.__spec__.origin == module.__file__
compiler = importlib.import_module("torch._dynamo")
assert compiler.optimize
assert getattr(compiler, "{module}".rpartition(".")[2], module) is module
from torch._dynamo import symbolic_convert
assert symbolic_convert.trace_rules is sys.modules["torch._dynamo.trace_rules"]
assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item() == 2
"""
MODULES = ("utils", "decorators", "eval_frame", "trace_rules", "device_interface", "variables")
"""Of torch's compiler: those that import the rest, or are imported by it before they are ready."""


def test_everything_is_imported_once_and_transformers_is_left_as_it_was():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_who_compiles_with_torch_gets_its_compiler_all_the_same():
    result = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "statement",
    [
        *(f"import torch._dynamo.{name}" for name in MODULES),
        "from torch._dynamo.utils import counters",
        "import torch._inductor",
    ],
)
def test_parts_of_the_compiler_can_be_imported_by_their_names(statement):
    """Torch's code for a card does so; until the compiler was imported as a whole first, it was a KeyError there."""
    module = statement.split()[1]
    program = BY_NAME.format(statement=statement, module=module)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_part_that_the_compiler_has_not_is_told_as_that():
    program = "from hybrimoe.compat import leave_dynamo_out\nleave_dynamo_out()\nimport torch._dynamo.absent"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "No module named 'torch._dynamo.absent'" in result.stderr


LOADS = """
import sys
from hybrimoe.cli.shared.libraries import import_libraries
import_libraries()
import hybrimoe
model = hybrimoe.load(packed_file=False, accelerator="none")
assert not {"sympy", "torch._dynamo.symbolic_convert"} & set(sys.modules)
import torch
with torch.device("meta"):
    assert torch.arange(2).is_meta
assert torch.nn.Linear(2, 2).weight.abs().sum() > 0
"""


def test_a_model_is_loaded_without_what_torch_compiles_with():
    result = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
