"""Runs `hybrimoe bench overhead`: planning, bookkeeping and dispatch of a layer call beside its kernels.

python benchmarks/overhead.py --help
python benchmarks/overhead.py --shape olmoe-1b-7b --json
"""

import sys

from hybrimoe.cli.app import app

if __name__ == "__main__":
    app(["bench", "overhead", *sys.argv[1:]])
