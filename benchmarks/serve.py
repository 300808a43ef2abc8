"""Runs `hybrimoe bench serve`: users who talk to an OpenAI-compatible server at the same time.

python benchmarks/serve.py --help
python benchmarks/serve.py --users 1 --users 4 --turns 3
python benchmarks/serve.py --url http://127.0.0.1:8080     # another server, such as llama.cpp's
"""

import sys

from hybrimoe.cli.app import app

if __name__ == "__main__":
    app(["bench", "serve", *sys.argv[1:]])
