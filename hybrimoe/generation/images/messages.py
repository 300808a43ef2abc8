"""Messages with images: their content is a list of parts, of which some are texts and some images.

In memory an image part is `{"type": "image", "image": ImageFile}`, which chat templates know by its type; in files it
is `{"type": "image_url", ...}` with a data: URL, as chat APIs take it. A message without images has a text as its
content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybrimoe.generation.images.reading import ImageError, ImageFile, from_data_url

__all__ = ["as_json", "content_from_json", "for_template", "images_in", "text_in", "with_images"]

Message = Mapping[str, Any]


def with_images(text: str, images: Sequence[ImageFile]) -> str | list[dict[str, Any]]:
    """The content of a message that shows images and then says a text."""
    if not images:
        return text
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]


def images_in(messages: Iterable[Message]) -> list[Any]:
    """All images, in the order in which a template shows them, as the parts hold them."""
    return [part["image"] for message in messages for part in _parts(message.get("content")) if part["type"] == "image"]


def text_in(message: Message) -> str:
    """The words of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def for_template(message: Message, placeholder: str | None = None) -> dict[str, Any]:
    """A message as chat templates take it. placeholder: what stands for an image where the template knows no parts."""
    parts = _parts(message.get("content"))
    if not parts:
        return dict(message)
    if placeholder is not None:
        shown = "".join(placeholder if part["type"] == "image" else part["text"] for part in parts)
        return {**message, "content": shown}
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in parts]}


def as_json(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as a file holds them, images included."""
    return [
        {**message, "content": [_part_as_json(part) for part in parts]}
        if (parts := _parts(message.get("content")))
        else dict(message)
        for message in messages
    ]


def content_from_json(content: Any, where: str) -> str | list[dict[str, Any]]:
    """The content of a message of a file. Raises ValueError with what is wrong; `where` says of which message."""
    if isinstance(content, str):
        content.encode("utf-8")  # half of a surrogate pair is valid JSON, and no text
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where}: expected an object with role and content, both texts")
    return [_part_from_json(part, where) for part in content]


def _parts(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else []


def _part_as_json(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": part["image"].data_url()}} if part["type"] == "image" else part


def _part_from_json(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        part["text"].encode("utf-8")
        return {"type": "text", "text": part["text"]}
    url = part.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise ValueError(f"{where}: expected parts that are text, or image_url with a data: URL")
    try:
        return {"type": "image", "image": from_data_url(url, f"{where}, an image")}
    except ImageError as error:
        raise ValueError(str(error)) from error
