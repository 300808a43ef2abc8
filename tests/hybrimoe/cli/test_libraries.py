"""What the commands import, and what they leave out of it."""

import subprocess
import sys

PROGRAM = """
import gc, sys
from hybrimoe.cli.libraries import RUNS_MODELS, import_libraries
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
frozen = gc.get_freeze_count()
import_libraries("json.tool")
assert gc.get_freeze_count() == frozen
"""


def test_everything_is_imported_once_and_transformers_is_left_as_it_was():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
