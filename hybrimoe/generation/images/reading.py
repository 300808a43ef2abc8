"""Image files as clients and users give them: checked before they are decoded, and decoded to pixels."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.errors import FileError, MissingExtraError, PromptError

__all__ = ["ImageError", "ImageFile", "from_base64", "from_data_url", "read_image_file"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""That are decoded: each is told by its own first bytes, whatever a client calls it. Of animations the first one."""
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
MAX_FILE_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
"""Width times height. A file of some kB can decode to more than memory holds; cameras make up to 50 million."""
MIN_SIDE, MAX_RATIO = 1, 200
"""Shortest side in pixels; long side by short side at most, as the processors of most models have it."""


class ImageError(PromptError):
    """An image that cannot be read, or is larger than what is taken."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """The bytes of an image file. what: where it comes from, for messages."""

    data: bytes
    what: str

    def pixels(self) -> Any:
        """The picture, a PIL image in RGB, turned as its camera says. Raises ImageError, MissingExtraError."""
        image_module, ops = _pillow()
        try:
            with image_module.open(io.BytesIO(self.data), formats=FORMATS) as image:
                self._check_size(*image.size)
                image.load()
                return ops.exif_transpose(image).convert("RGB")
        except ImageError:
            raise
        except image_module.DecompressionBombError as error:
            raise self._too_large(str(error)) from error
        except image_module.UnidentifiedImageError as error:
            known = ", ".join(FORMATS)
            raise ImageError(f"{self.what} is no image that can be read: expected one of {known}") from error
        except Exception as error:  # decoders raise what they like about damaged files
            raise ImageError(f"{self.what} is damaged: {error or type(error).__name__}") from error

    def data_url(self) -> str:
        """The file as a URL that holds it, as chat APIs take images."""
        image_module, _ = _pillow()
        try:
            with image_module.open(io.BytesIO(self.data), formats=FORMATS) as image:
                media = MEDIA_TYPES[str(image.format)]
        except Exception as error:  # as above
            raise ImageError(f"{self.what} is no image that can be read") from error
        return f"data:{media};base64,{base64.b64encode(self.data).decode()}"

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise self._too_large(f"{width} x {height}")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
            raise ImageError(
                f"{self.what} has {width} x {height} pixels: expected sides of at least {MIN_SIDE}, and one at most"
                f" {MAX_RATIO} times as long as the other"
            )

    def _too_large(self, found: str) -> ImageError:
        return ImageError(
            f"{self.what} has too many pixels ({found}): at most {MAX_PIXELS / 1e6:.0f} million are decoded; make it"
            " smaller"
        )


def read_image_file(path: str | Path) -> ImageFile:
    """The image of a path. Raises FileError where it cannot be read, ImageError for a file that is too large."""
    place = Path(path).expanduser()
    try:
        if place.stat().st_size > MAX_FILE_BYTES:
            raise _too_many_bytes(str(place), place.stat().st_size)
        return ImageFile(place.read_bytes(), str(place))
    except OSError as error:
        raise FileError(f"cannot read {place} ({error.strerror}): expected an image file") from error


def from_base64(text: str, what: str) -> ImageFile:
    """The image that base64 stands for. Raises ImageError for what is none, or is too large."""
    if len(text) * 3 // 4 > MAX_FILE_BYTES + 3:
        raise _too_many_bytes(what, len(text) * 3 // 4)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{what}: expected an image in base64 ({error})") from error
    if not data:
        raise ImageError(f"{what}: expected an image in base64, found nothing")
    return ImageFile(data, what)


def from_data_url(url: str, what: str) -> ImageFile:
    """The image within a `data:` URL. Raises ImageError for other URLs: nothing is fetched that a client names."""
    if url[:5].lower() != "data:":
        scheme = url.partition(":")[0][:20] if ":" in url else "none"
        raise ImageError(
            f"{what}: images are not fetched from elsewhere (found a URL of the kind {scheme!r}): send the image"
            " itself, as data:image/png;base64,..."
        )
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"{what}: expected a data: URL in base64, as data:image/png;base64,...")
    return from_base64(body, what)


def _too_many_bytes(what: str, n_bytes: int) -> ImageError:
    return ImageError(
        f"{what} has {n_bytes / 2**20:.1f} MiB: an image file has at most {MAX_FILE_BYTES / 2**20:.0f} MiB; make it"
        " smaller"
    )


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtraError("images", str(error)) from error
    return Image, ImageOps
