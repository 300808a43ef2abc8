"""Images in requests: in each API a text that holds the file itself. Nothing is fetched that a client names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe.errors import MissingExtraError, ModelError, PromptError
from hybrimoe.generation.images.messages import images_in
from hybrimoe.generation.images.reading import ImageError, ImageFile, from_base64, from_data_url
from hybrimoe.generation.images.vision import MAX_IMAGES, Vision
from hybrimoe.server.errors import RequestError

__all__ = ["EncodedImage", "decoded", "image_part", "text_part"]

MODELS_OF_TEXT = "it was loaded as a model of text"


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as a client sends it. text: base64, or a data: URL with it (is_url). where: its field of the request."""

    text: str
    where: str
    is_url: bool = False

    def file(self) -> ImageFile:
        """The file. Raises ImageError."""
        return (from_data_url if self.is_url else from_base64)(self.text, self.where)


def image_part(text: str, where: str, *, is_url: bool) -> dict[str, Any]:
    """A part of a message's content; see `EncodedImage`."""
    return {"type": "image", "image": EncodedImage(text, where, is_url)}


def text_part(text: str) -> dict[str, Any]:
    """The same of words."""
    return {"type": "text", "text": text}


def decoded(messages: Sequence[dict[str, Any]], vision: Vision | None) -> list[ImageFile]:
    """The images of a conversation, in the order in which its template shows them.

    Raises RequestError, which names the part, where the model takes none, and for what is no image.
    """
    images: list[EncodedImage] = images_in(messages)
    if not images:
        return []
    reason = MODELS_OF_TEXT if vision is None else vision.reason
    if reason is not None:
        raise RequestError(
            f"{images[0].where}: expected text content, found an image: this model takes no images ({reason})",
            images[0].where,
        )
    assert vision is not None
    if len(images) > MAX_IMAGES:
        where = images[MAX_IMAGES].where
        raise RequestError(f"{where}: {len(images)} images: at most {MAX_IMAGES} are taken in one request", where)
    files = []
    for image in images:
        try:
            files.append(image.file())
            vision.look(files[-1])
        except ImageError as error:
            raise RequestError(str(error), image.where) from error
        except (PromptError, ModelError, MissingExtraError) as error:
            raise RequestError(f"{image.where}: {error}", image.where) from error
    return files
