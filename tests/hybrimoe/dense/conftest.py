"""Makes `tiny_families` (the table of tiny configurations) importable from the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
