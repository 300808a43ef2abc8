"""Runs `hybrimoe bench kernels`: expert kernels beside torch, ONNX Runtime and llama.cpp.

python benchmarks/kernels.py --help
python benchmarks/kernels.py --quick
python benchmarks/kernels.py --csv kernels.csv --plot kernels.png --json > kernels.json
"""

import sys

from hybrimoe.cli.app import app

if __name__ == "__main__":
    app(["bench", "kernels", *sys.argv[1:]])
