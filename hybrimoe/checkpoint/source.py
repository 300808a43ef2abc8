"""Finds a model (a directory, a GGUF file, a hub id, the demo model), its configuration, and the files of its weights.

Nothing here imports torch or transformers: a wrong path is noticed before the seconds that these take.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError, listed, stands_for, unreadable
from hybrimoe.checkpoint.gguf.config import config_of
from hybrimoe.checkpoint.gguf.file import PART_NAME, first_part, first_parts, is_gguf, open_gguf
from hybrimoe.demo import smollm2
from hybrimoe.errors import CheckpointError, ModelError
from hybrimoe.text_files import parse_json, read_text

INDEX_NAME, SINGLE_NAME, CONFIG_NAME = "model.safetensors.index.json", "model.safetensors", "config.json"
MANIFEST_NAME, CHECKSUMS_NAME = "hybrimoe-pack.json", "hybrimoe-pack.sums"
"""What a folder that `hybrimoe convert` has written says of itself, and the checksums of all of it."""
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
HUB_FILE = re.compile(r"^(?P<hub_id>[A-Za-z0-9][\w.-]*/[\w.-]+):(?P<name>[\w./ -]+\.gguf)$")
"""A GGUF file of a hub repository: `owner/name:FILE.gguf`."""
HUB_PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
HUB_LEFT_OUT = ("original/*", "consolidated*", "onnx/*", "*/*.safetensors")
"""The same weights once more, in other layouts: Meta's, Mistral's, ONNX, and formats in folders of their own."""
UNFINISHED = ("*.incomplete", "*.part", "*.partial", "*.crdownload", "*.aria2", "*.download")
"""Names of files that are still being fetched, by git, browsers and download programs."""
TO_SAFETENSORS = (
    "take the model's safetensors, or convert it once, with transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
    ".save_pretrained(NEW_FOLDER)"
)
EXPECTED = (
    f"a directory with {CONFIG_NAME} and *.safetensors, a GGUF file, or a hub id, owner/name or owner/name:FILE.gguf"
)


def model_path(path_or_hub_id: str | Path | None) -> Path:
    """The directory of a model, or its GGUF file (of a split one the first part); None is the demo model, smollm2 the
    one that `hybrimoe demo smollm2` made, and what looks like `owner/name` or `owner/name:FILE.gguf` is fetched from
    the hub, of a split file all parts. A directory without config.json is the one GGUF model in it.

    Raises ModelError where there is no model.
    """
    if path_or_hub_id is None:
        from hybrimoe.demo import demo_model_path

        return demo_model_path()
    path = Path(path_or_hub_id).expanduser()
    if str(path_or_hub_id) == smollm2.NAME and not path.exists():
        return smollm2.made_model_path()
    if path.is_dir():
        return _only_gguf(path) or path
    if is_gguf(path):
        return first_part(path)
    if path.exists():
        raise ModelError(stands_for(path) or f"{path} is a file; {_what_to_give(path)}")
    if is_hub_id(path_or_hub_id):
        return _from_hub(str(path_or_hub_id))
    if (file := HUB_FILE.match(str(path_or_hub_id))) is not None:
        return first_part(_file_from_hub(file["hub_id"], file["name"]))
    raise ModelError(stands_for(path) or f"no model directory {path}; expected {EXPECTED}")


def read_config_dict(path: Path) -> dict[str, Any]:
    """config.json of a model directory, or what a GGUF file says in its place.

    Raises ModelError where the directory holds no model, CheckpointError for a GGUF file that is damaged.
    """
    return config_of(open_gguf(path)) if path.is_file() else _read_json(path)


def _read_json(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_NAME
    try:
        config = parse_json(read_text(file))
    except FileNotFoundError as error:
        raise ModelError(
            stands_for(file) or f"{directory} is no model directory: it has no {CONFIG_NAME}{_snapshot_in(directory)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(stands_for(file) or unreadable(file, error, "fetch it again")) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{file} is no model configuration: it has no model_type")
    return config


def _what_to_give(file: Path) -> str:
    if (file.parent / CONFIG_NAME).is_file():
        return f"give the model's folder: {file.parent}"
    return f"expected {EXPECTED}"


def _snapshot_in(directory: Path) -> str:
    """Where a folder of the hub's cache has the model itself; "" for other folders."""
    found = sorted(directory.glob(f"snapshots/*/{CONFIG_NAME}"), key=lambda file: file.parent.stat().st_mtime)
    return f"; it is a folder of the hub's cache: give {found[-1].parent}" if found else ""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where a model's weights lie. file_of_key: name of the file by tensor; None where all are in the only file."""

    paths: tuple[Path, ...]
    file_of_key: dict[str, str] | None = None


def weight_files(directory: Path) -> WeightFiles:
    """The safetensors files of `directory`; none is opened.

    One file with all weights goes before an index of shards that does not name it, as in transformers: the index is
    left from an earlier save.

    Raises CheckpointError where there are none, or shards are missing, UnsupportedCheckpointError where there are
    weights in other formats only.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if index.is_file():
        file_of_key = _read_index(index)
        if not single.is_file() or SINGLE_NAME in file_of_key.values():
            return _shards(directory, file_of_key)
    candidates = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if len(candidates) != 1:
        raise _no_weights(directory, candidates)
    return WeightFiles((candidates[0],))


def has_weights(directory: Path) -> bool:
    """Whether all files of the weights of `directory` are there."""
    try:
        return bool(weight_files(directory).paths)
    except CheckpointError:
        return False


def check_model(path_or_hub_id: str | Path | None, *, weights: bool = True) -> None:
    """Raises ModelError or CheckpointError where there is no model: what a command asks before it imports torch.

    weights: whether the files of a directory's weights must be there, too. Of a hub id config.json is fetched.
    """
    if is_hub_id(path_or_hub_id):
        read_config_dict(hub_config_file(str(path_or_hub_id)).parent)
        return
    path = model_path(path_or_hub_id)
    read_config_dict(path)
    if weights and path.is_dir():
        weight_files(path)


def check_pack(folder: Path) -> None:
    """Raises CheckpointError for a folder that `hybrimoe convert` has not written: before torch is imported, too."""
    if not folder.is_dir() or not ((folder / MANIFEST_NAME).exists() or (folder / CHECKSUMS_NAME).exists()):
        raise CheckpointError(
            f"{folder} is no pack: expected a folder with {MANIFEST_NAME} that `hybrimoe convert` has written; other"
            " checkpoints carry no checksums to compare with"
        )


def is_hub_id(model: str | Path | None) -> bool:
    """Whether a model is named by the hub's `owner/name`, and nothing here is called so."""
    return model is not None and HUB_ID.match(str(model)) is not None and not Path(model).expanduser().exists()


def hub_config_file(hub_id: str) -> Path:
    """The cached or fetched config.json of a hub id.

    Raises ModelError where the hub's cache has none of that id and none can be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(hub_id, CONFIG_NAME))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{hub_id} is no directory here, and its {CONFIG_NAME} is neither in the hub's cache nor can it be fetched"
            f" ({first}); run `hf download {hub_id} {CONFIG_NAME}` on a machine with a network, or give a directory"
        ) from error


def packed_folder(path: Path) -> Path:
    """Where packed files lie beside a model: in its directory, or in a folder named like its GGUF file."""
    return path.with_suffix(".hybrimoe") if path.is_file() else path


def is_demo(directory: Path) -> bool:
    """True for the directory of the model that the package ships, into which nothing is ever written."""
    from importlib.resources import files

    return directory.resolve().is_relative_to(Path(str(files("hybrimoe"))).resolve())


def _only_gguf(directory: Path) -> Path | None:
    """The one GGUF model of a directory without config.json. Raises ModelError where it has several."""
    if (directory / CONFIG_NAME).exists():
        return None
    found = first_parts(directory)
    if len(found) > 1:
        raise ModelError(f"{directory} has several GGUF models ({listed([path.name for path in found])}); name one")
    return found[0] if found else None


def _read_index(index: Path) -> dict[str, str]:
    """File name by key. Raises CheckpointError for an index that is damaged."""
    try:
        weight_map = parse_json(read_text(index))["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            stands_for(index) or f"{index} cannot be read as a safetensors index: {error!r}; fetch it again"
        ) from error


def _shards(directory: Path, file_of_key: dict[str, str]) -> WeightFiles:
    names = sorted(set(file_of_key.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        lost = sum(shard in missing for shard in file_of_key.values())
        raise CheckpointError(f"{directory} lacks {listed(missing)} ({lost} tensors); fetch the missing shards")
    return WeightFiles(tuple(directory / name for name in names), file_of_key)


def _no_weights(directory: Path, candidates: list[Path]) -> CheckpointError:
    if candidates:
        found = listed([file.name for file in candidates])
        return CheckpointError(
            f"{directory} has several weight files ({found}) and no {INDEX_NAME} that joins them; fetch the index, or"
            " remove the files that do not belong to the model"
        )
    if unfinished := sorted(file.name for pattern in UNFINISHED for file in directory.glob(pattern)):
        return CheckpointError(f"{directory} has no weights yet: {listed(unfinished)} is not fetched to its end")
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf", "*.h5") for file in directory.glob(pattern))
    if others:
        what = "give the GGUF file itself" if others[0].endswith(".gguf") else TO_SAFETENSORS
        return UnsupportedCheckpointError(f"{directory} has {listed(others)} but no *.safetensors; {what}")
    return CheckpointError(f"{directory} has no weights: expected {SINGLE_NAME} or {INDEX_NAME} with its shards")


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=[*HUB_PATTERNS], ignore_patterns=[*HUB_LEFT_OUT]))
        if not (directory / CONFIG_NAME).is_file():
            raise ModelError(
                f"{hub_id} has no {CONFIG_NAME}; of a repository of GGUF files name the one to take: {hub_id}:FILE.gguf"
            )
        index = directory / INDEX_NAME
        weights = sorted(set(_read_index(index).values())) if index.is_file() else ["*.safetensors"]
        return Path(snapshot_download(hub_id, allow_patterns=weights, ignore_patterns=[*HUB_LEFT_OUT]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"{hub_id} is neither a directory here nor a model that the hub gives: {error}") from error


def _file_from_hub(hub_id: str, name: str) -> Path:
    """A GGUF file of a repository, with all parts where it is split. Raises ModelError where the hub gives none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    part = PART_NAME.match(name)
    pattern = name if part is None else f"{part['stem']}-*-of-{part['count']}.gguf"
    try:
        file = Path(snapshot_download(hub_id, allow_patterns=[pattern])) / name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"{hub_id} is no repository that the hub gives: {error}") from error
    if not file.is_file():
        raise ModelError(f"{hub_id} has no file {name}; expected the name of a GGUF file that its page lists")
    return file
