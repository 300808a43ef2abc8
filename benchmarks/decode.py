"""Runs `hybrimoe bench decode`: policies and dtypes side by side, in tokens a second.

python benchmarks/decode.py --help
python benchmarks/decode.py --compare-policies
python benchmarks/decode.py --shape olmoe-1b-7b --layers 8 --dtype int4 --no-plain
"""

import sys

from hybrimoe.cli.app import app

if __name__ == "__main__":
    app(["bench", "decode", *sys.argv[1:]])
