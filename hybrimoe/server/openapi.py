"""The OpenAPI document, with the answers that this server gives instead of those that FastAPI assumes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

ASSUMED_STATUS = "422"
"""FastAPI documents it for every route that takes data; here such requests are answered with 400."""
ASSUMED_SCHEMAS = ("HTTPValidationError", "ValidationError")


def documented(app: FastAPI) -> None:
    """Make `app` describe itself as it is."""
    assumed = app.openapi

    def openapi() -> dict[str, Any]:
        document = assumed()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop(ASSUMED_STATUS, None)
        for name in ASSUMED_SCHEMAS:
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to change the document
