"""What a model sees of an image: its processor, its tower, and the tokens that stand for the image in a prompt."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybrimoe import compat
from hybrimoe.errors import HybriMoEError, MissingExtraError, ModelError, PromptError
from hybrimoe.experts.towers import tower_paths
from hybrimoe.generation.images.forward import positions_module
from hybrimoe.generation.images.reading import ImageError, ImageFile
from hybrimoe.generation.images.tokens import Features, ImageToken, Picture

__all__ = ["MAX_IMAGES", "Look", "Vision"]

INSTALL = "pip install 'hybrimoe[images]'"
TORCHVISION = "torchvision"
MAX_IMAGES = 64
"""Of one prompt."""
MAX_SEEN_BYTES = 256 << 20
"""Memory of what the tower has computed of the latest images: the next turn of a chat brings them again."""
ROWS = {"llama4": ("last_hidden_state",)}
"""Fields of the tower's output that the forward of a family reads; of the others the two below."""
USUAL_ROWS = ("pooler_output", "deepstack_features")
MARK = "\ufdd0"
"""Stands before the name of a special token that is meant as text (`hybrimoe.generation.control_tokens`)."""


@dataclass(frozen=True, slots=True)
class Look:
    """An image as it stands in a prompt. text: the placeholders and what is around them, in the tokenizer's words."""

    picture: Picture
    features: Features
    text: str


class Vision:
    """The sight of one model. Methods may be called by several threads; one image is computed at a time.

    folder: of the model, where its processor's settings are. reason: why it takes no images, None where it does.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        self._model, self._tokenizer, self._folder = model, tokenizer, folder
        self.reason = _reason_against(model, folder)
        self._processor: Any = None
        self._looks: OrderedDict[bytes, Look] = OrderedDict()
        self._lock = threading.Lock()
        self.n_computed = 0
        """Images that went through the tower."""

    @property
    def placeholder(self) -> str:
        """What stands for an image in a text. Raises as `look`."""
        with self._lock:
            return str(self._opened().image_token)

    def check(self) -> None:
        """Raises PromptError where the model takes no images."""
        if self.reason is not None:
            raise PromptError(f"this model takes no images: {self.reason}")

    def look(self, image: ImageFile) -> Look:
        """What the model sees of an image.

        Raises ImageError for one that cannot be read, PromptError where the model takes none, MissingExtraError where
        the packages of its processor are not installed, ModelError for a processor that cannot be used.
        """
        self.check()
        name = hashlib.sha256(image.data).digest()
        with self._lock:
            if name not in self._looks:
                processor = self._opened()
                self._looks[name] = self._computed(processor, image)
                self._forget_the_oldest()
            self._looks.move_to_end(name)
            return self._looks[name]

    def encode(
        self, text: str, images: Sequence[ImageFile], encode: Callable[[str], Sequence[int]]
    ) -> list[int]:  # fmt: skip
        """Token ids of a text in which the images' placeholders stand in their order. encode: from text to tokens.

        Raises as `look`, and PromptError where the text has not as many placeholders as there are images.
        """
        if len(images) > MAX_IMAGES:
            raise PromptError(f"{len(images)} images: at most {MAX_IMAGES} are taken in one prompt")
        looks = [self.look(image) for image in images]
        parts = self._parts(text)
        if len(parts) != len(looks) + 1:
            raise PromptError(
                f"the prompt has {len(parts) - 1} times the model's placeholder for an image ({self.placeholder}), and"
                f" there are {len(looks)} images"
            )
        whole = parts[0] + "".join(look.text + part for look, part in zip(looks, parts[1:], strict=True))
        return self._with_images(list(encode(whole)), looks)

    def n_places(self, text: str) -> int:
        """How many placeholders for images stand in a text."""
        return len(self._parts(text)) - 1

    def _parts(self, text: str) -> list[str]:
        """A text without the placeholders in it; those that are meant as text stay."""
        return re.split(f"(?<!{MARK}){re.escape(self.placeholder)}", text)

    def _with_images(self, token_ids: list[int], looks: Sequence[Look]) -> list[int]:
        """The placeholders in the place of plain numbers."""
        number = _image_token_id(self._model.config)
        tokens = iter([ImageToken(number, look.picture, place, look.features)
                       for look in looks for place in range(look.picture.n_tokens)])  # fmt: skip
        n_found, n_expected = token_ids.count(number), sum(look.picture.n_tokens for look in looks)
        if n_found != n_expected:
            raise PromptError(
                f"the prompt has {n_found} tokens for parts of images (token {number}), and the images have"
                f" {n_expected}: leave the model's own placeholders out of the text"
            )
        return [next(tokens) if token == number else token for token in token_ids]

    def _opened(self) -> Any:
        """The model's processor, once it is needed."""
        if self._processor is None:
            config = self._model.config
            try:
                self._processor = compat.image_processor(self._folder, self._tokenizer, str(config.model_type))
            except ImportError as error:
                raise _missing(error) from error
            except Exception as error:  # whatever else transformers raises of it is about the model's files
                if TORCHVISION in str(error).lower():
                    raise _missing(error) from error
                reason = f"cannot be used: {_first_line(error)}"
                if "trust_remote_code" in str(error):
                    reason = (
                        "is code of its own (auto_map in preprocessor_config.json), which hybrimoe never runs; text is"
                        " taken"
                    )
                raise ModelError(f"the image processor of {self._folder} {reason}") from error
        return self._processor

    def _computed(self, processor: Any, image: ImageFile) -> Look:
        import torch

        pixels = image.pixels()
        try:
            seen, text = compat.prepared_image(processor, pixels)
        except ImportError as error:
            raise _missing(error) from error
        except Exception as error:  # and of an image about that one: too narrow, too small
            raise ImageError(
                f"{image.what} ({pixels.width} x {pixels.height} pixels) is none that the model's processor takes:"
                f" {_first_line(error)}"
            ) from error
        wanted = compat.image_features_arguments(self._model)
        given = {name: value for name, value in seen.items() if name in wanted}
        moved = {name: _moved(value, self._model) for name, value in given.items()}
        with torch.inference_mode():
            output = self._model.get_image_features(**moved, return_dict=True)
        self.n_computed += 1
        features = _features(output, ROWS.get(str(self._model.config.model_type), USUAL_ROWS))
        return Look(self._picture(_key(seen), _n_tokens(features), given), features, text)

    def _picture(self, key: bytes, n_tokens: int, given: dict[str, Any]) -> Picture:
        module = positions_module(self._model)
        if module is None:
            return Picture(key, n_tokens, n_tokens)
        import torch

        number = _image_token_id(self._model.config)
        ids = torch.tensor([[number] * n_tokens + [number + 1]])
        types = torch.tensor([[1] * n_tokens + [0]])
        grids = {name: value for name, value in given.items() if name.endswith("_grid_thw")}
        positions, _ = module.get_rope_index(ids, mm_token_type_ids=types, **grids)
        offsets = positions[-3:, 0].cpu()
        return Picture(key, n_tokens, int(offsets[0, -1]), offsets[:, :-1].clone())

    def _forget_the_oldest(self) -> None:
        while len(self._looks) > 1 and sum(one.features.nbytes for one in self._looks.values()) > MAX_SEEN_BYTES:
            self._looks.popitem(last=False)


def _reason_against(model: Any, folder: Path) -> str | None:
    if not hasattr(model, "get_image_features"):
        return "it was loaded as a model of text"
    if not tower_paths(model):
        return "its vision part was left out (vision: none)"
    if not compat.has_processor(folder):
        return f"{folder} has no settings of an image processor (preprocessor_config.json)"
    if find_spec("PIL") is None:
        return f"Pillow is not installed; install it: {INSTALL}"
    return None


def _image_token_id(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        if (number := getattr(config, name, None)) is not None:
            return int(number)
    raise ModelError("config.json does not say which token stands for an image (image_token_id)")


def _features(output: Any, names: Sequence[str]) -> Features:
    rows: dict[str, Any] = {}
    split: set[str] = set()
    for name in names:
        value = getattr(output, name, None)
        if value is None:
            continue
        levels = list(value) if name == "deepstack_features" else [value]
        joined = [_rows(level) for level in levels]
        if any(not _is_tensor(level) for level in levels):
            split.add(name)
        rows[name] = joined if name == "deepstack_features" else joined[0]
    return Features(type(output), rows, frozenset(split))


def _rows(value: Any) -> Any:
    """[n, D] of what is a tensor [..., D], or a tensor an image."""
    import torch

    whole = value if _is_tensor(value) else torch.cat([one.flatten(0, -2) for one in value])
    return whole.flatten(0, -2).clone()


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "flatten")


def _n_tokens(features: Features) -> int:
    rows = next(iter(features.rows.values()))
    return len(rows[0] if isinstance(rows, list) else rows)


def _key(seen: dict[str, Any]) -> bytes:
    """A hash of all that the processor makes of an image."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(seen.items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().data if value.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.digest()


def _moved(value: Any, model: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def _missing(error: Exception) -> HybriMoEError:
    """Pillow comes with the extra; torchvision must be of the release that belongs to torch, which pip cannot tell."""
    if TORCHVISION not in str(error).lower():
        return MissingExtraError("images", _first_line(error))
    installed = find_spec(TORCHVISION) is not None
    state = f"which is installed and cannot be used ({_first_line(error)})" if installed else "which is not installed"
    return ModelError(
        f"the image processor of this family needs torchvision, {state}: install {compat.torchvision_release()}"
    )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
