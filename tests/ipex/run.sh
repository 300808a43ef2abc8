#!/usr/bin/env bash
# The parity suite of the CPU backend `ipex`, in an environment of its own (.venv-ipex, or $HYBRIMOE_IPEX_VENV).
#
# Intel Extension for PyTorch 2.8.0 is the last release and works with torch 2.8 alone, so it cannot share the
# environment of the other tests. torch's 2.8 wheel on PyPI does not import without its nvidia packages: about 3 GB are
# downloaded and 7 GB of disk taken, also on a machine without a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

VENV="${HYBRIMOE_IPEX_VENV:-.venv-ipex}"
PYTHON="${PYTHON:-python3}"

if [[ "$(uname -s) $(uname -m)" != "Linux x86_64" ]]; then
  echo "Intel Extension for PyTorch exists for Linux on x86-64; this is $(uname -s) on $(uname -m)" >&2
  exit 1
fi
if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
  echo "needs Python 3.11 to 3.13 ($("$PYTHON" --version) found): set PYTHON to one of them" >&2
  exit 1
fi
if [[ ! -x "$VENV/bin/python" ]]; then
  "$PYTHON" -m venv "$VENV"
  echo '*' >"$VENV/.gitignore"
fi

stamp="$VENV/.hybrimoe-ipex"
key="$(cat pyproject.toml constraints.txt "$0" | sha256sum)"
if [[ "$(cat "$stamp" 2>/dev/null)" != "$key" ]]; then
  echo "setting up $VENV: torch 2.8 with its nvidia packages, about 3 GB to download and 7 GB on disk"
  grep -vE '^(torch|triton)==' constraints.txt >"$VENV/constraints.txt" # the extra pins its own torch
  "$VENV/bin/python" -m pip --disable-pip-version-check install -q -c "$VENV/constraints.txt" -e '.[ipex]' pytest
  echo "$key" >"$stamp"
fi

exec "$VENV/bin/python" -m pytest -q tests/cpu_kernels/ipex_parity.py tests/cpu_kernels/test_ipex_backend.py "$@"
