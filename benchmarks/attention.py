"""Runs `hybrimoe bench attention`: a decode step's attention over a long context, ours against PyTorch's.

python benchmarks/attention.py --help
python benchmarks/attention.py --context 4096 --context 32768
"""

import sys

from hybrimoe.cli.app import app

if __name__ == "__main__":
    app(["bench", "attention", *sys.argv[1:]])
