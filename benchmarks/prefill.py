"""Runs `hybrimoe bench prefill`: policies and dtypes side by side, in tokens a second.

python benchmarks/prefill.py --help
python benchmarks/prefill.py --compare-policies
python benchmarks/prefill.py --shape olmoe-1b-7b --layers 8 --dtype int4 --no-plain
"""

import sys

from hybrimoe.cli.app import app

if __name__ == "__main__":
    app(["bench", "prefill", *sys.argv[1:]])
