"""The files of the page: where they are served, with which headers.

All are read once. A browser keeps them and asks each time whether they have changed (their ETag is a hash of their
content), so that a new version of the server never meets an old page.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

__all__ = ["ASSETS", "FOLDER", "HEADERS", "add_routes", "read_files"]

ASSETS = Path(__file__).parent / "assets"
FOLDER = "/page/"
"""Where all files but the page itself are served. They hold no data: they need no key."""
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
SECURITY = (
    "default-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "object-src 'none'",
    "require-trusted-types-for 'script'", "trusted-types dompurify",
)  # fmt: skip
"""The page's content security policy: nothing from elsewhere, no script or style within the page, and no text becomes
elements unless DOMPurify has made it safe."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(SECURITY),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def read_files(folder: Path = ASSETS) -> dict[str, File]:
    """All files of a folder by their path in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.relative_to(folder).as_posix()] = File(content, MEDIA_TYPES[path.suffix], etag)
    return found


def add_routes(app: FastAPI) -> None:
    """Adds `/` and `/page/...`."""
    files = read_files()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return _sent(files["index.html"], request)

    @app.api_route(f"{FOLDER}{{name:path}}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name}")
        return _sent(files[name], request)


def _sent(file: File, request: Request) -> Response:
    """The file, or that the browser's own copy is still the same."""
    headers = HEADERS | {"ETag": file.etag}
    known = [etag.strip().removeprefix("W/") for etag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
