"""Renews the libraries of the server's page: takes each file out of its npm package and notes version and checksum.

    python benchmarks/page_vendor.py                    # the newest versions
    python benchmarks/page_vendor.py marked@18.2.1      # one of them, in this version

Needs `npm`. Look at what has changed, run `make test-browser`, commit.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).resolve().parents[1] / "hybrimoe" / "server" / "page" / "assets" / "vendor"
LIST = VENDOR / "vendored.json"
LIBRARIES: dict[str, dict[str, str]] = {
    "marked": {"marked.esm.js": "lib/marked.esm.js", "marked.LICENSE.txt": "LICENSE"},
    "dompurify": {"purify.es.mjs": "dist/purify.es.mjs", "dompurify.LICENSE.txt": "LICENSE"},
    "uplot": {
        "uPlot.esm.js": "dist/uPlot.esm.js", "uPlot.min.css": "dist/uPlot.min.css", "uplot.LICENSE.txt": "LICENSE",
    },
    "@highlightjs/cdn-assets": {"highlight.min.js": "es/highlight.min.js", "highlight.LICENSE.txt": "LICENSE"},
}  # fmt: skip
"""npm package: {name here: path in the package}."""


def main() -> None:
    """Renews what the command line names, or all."""
    wanted = {word.rpartition("@")[0] or word: word for word in sys.argv[1:]} or {name: name for name in LIBRARIES}
    listed: dict[str, Any] = json.loads(LIST.read_text(encoding="utf-8")) if LIST.exists() else {}
    for name, spec in wanted.items():
        listed[name] = _renewed(spec, LIBRARIES[name])
        print(name, listed[name]["version"])
    LIST.write_text(json.dumps(dict(sorted(listed.items())), indent=2) + "\n", encoding="utf-8")


def _renewed(spec: str, files: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["npm", "pack", "--json", spec], cwd=folder, check=True, capture_output=True, text=True)
        told = json.loads(packed.stdout)[0]
        with tarfile.open(Path(folder) / told["filename"]) as package:
            contents = {name: _read(package, f"package/{path}") for name, path in files.items()}
            licence = json.loads(_read(package, "package/package.json"))["license"]
    for name, content in contents.items():
        (VENDOR / name).write_bytes(content)
    return {
        "version": told["version"],
        "licence": licence,
        "files": {
            name: {"from": files[name], "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }


def _read(package: tarfile.TarFile, path: str) -> bytes:
    file = package.extractfile(path)
    assert file is not None, f"{path} is no file of the package"
    return file.read()


if __name__ == "__main__":
    main()
