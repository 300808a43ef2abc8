"""`convert`: a model packed once into one folder that later starts map, wherever the original has gone meanwhile."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from hybrimoe.checkpoint.dense import complete, load_dense, read_checked, strict_dtypes
from hybrimoe.checkpoint.experts import pack_experts
from hybrimoe.checkpoint.formats.quantisation import CONFIG_NAME, SIDE_FILES
from hybrimoe.checkpoint.loading import Loader
from hybrimoe.checkpoint.pack import dense as packed_dense
from hybrimoe.checkpoint.pack import experts as packed
from hybrimoe.checkpoint.pack.checksums import write_checksums
from hybrimoe.checkpoint.pack.folder import whole_or_nothing
from hybrimoe.checkpoint.pack.manifest import Manifest, read_manifest
from hybrimoe.checkpoint.progress import Progress, progress_of
from hybrimoe.checkpoint.source import CHECKSUMS_NAME, MANIFEST_NAME, SINGLE_NAME, model_path
from hybrimoe.checkpoint.tokenizer import load_tokenizer
from hybrimoe.config.deploy import DeployConfig, load_config
from hybrimoe.errors import ConfigError, FileError, ModelError

if TYPE_CHECKING:
    from hybrimoe.injection import Injection

COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "LICENSE*", "additional_chat_templates/*.jinja")
"""Of a model directory, beside the weights: tokenizer, sampling defaults, chat templates, licence."""
NOT_COPIED = (CONFIG_NAME, MANIFEST_NAME, CHECKSUMS_NAME, *SIDE_FILES)


@dataclass(frozen=True, slots=True)
class Converted:
    """A pack. is_new: False where the very same pack was there already. has_tokenizer: whether the model had one."""

    path: str
    expert_dtype: str
    dense_dtype: str
    n_bytes: int
    is_new: bool
    has_tokenizer: bool


def convert(
    path_or_hub_id: str | Path | None,
    into: str | Path,
    config: str | Path | Mapping[str, Any] | DeployConfig | None = None,
    *,
    progress: Progress | bool | None = None,
    **overrides: Any,
) -> Converted:
    """Packs a model into the folder `into`, which `hybrimoe.load` takes in its place.

    Arguments and errors as of `hybrimoe.load`; `expert_dtype` and `dense_dtype` say what is packed how. The folder
    appears when it is whole. Raises FileError where `into` holds something else, or cannot be written.
    """
    target = Path(into).expanduser().absolute()
    deployment = load_config(
        config, model=None if path_or_hub_id is None else str(path_or_hub_id), accelerator="none", **overrides
    )
    if deployment.rope is not None:
        raise ConfigError("rope: a pack has the positions of its model; leave it out, and give it where it is loaded")
    loader = Loader.open(deployment, packed_file=False)
    identity = _identity(loader)
    if not _is_free(target, identity):
        return _described(target, loader, is_new=False)
    try:
        with progress_of(progress) as show, whole_or_nothing(target) as place:
            _write(loader, place, identity, show)
    except OSError as error:
        if _is_free(target, identity):
            raise FileError(
                f"{target} cannot be written: {error.strerror or error}; choose a folder on a disk with room"
            ) from error
        return _described(target, loader, is_new=False)  # another process was first
    return _described(target, loader, is_new=True)


def _is_free(target: Path, identity: str) -> bool:
    """False where the pack is there already. Raises FileError where something else is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return True
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None or manifest.identity != identity:
        what = "a file" if target.is_file() else "a folder with other contents" if manifest is None else "another pack"
        raise FileError(f"{target} is there, {what}; give the name of a folder that is yet to be made")
    return False


def _identity(loader: Loader) -> str:
    """A hash of the checkpoint's contents, as far as `record_file.stamps` looks at them, of adapters, and of how it is
    packed."""
    contents = [stamp[:2] + stamp[3:] for stamp in loader.weights.stamps(()) if isinstance(stamp, list)]
    cpu, rules = loader.deployment.cpu, loader.deployment.rules
    known = [contents or loader.weights.stamps(()), cpu.expert_dtype, cpu.dense_dtype, rules]
    if adapters := loader.merged.stamps(sorted(loader.merged.identities)):
        known.append(adapters)
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()


def _write(loader: Loader, place: Path, identity: str, show: Progress) -> None:
    from hybrimoe.injection.inject import place_operators

    model, deployment = loader.model, loader.deployment
    dtypes = strict_dtypes(model, next(model.parameters()).dtype)
    parts = loader.parts()
    loaded = load_dense(model, parts.early, loader.shapes, dtypes)
    complete(model, loaded, parts.later, loader.plan, unknown_keys=deployment.unknown_keys)
    state = model.state_dict()
    rest = {key: state[key] for key in loaded if key not in model.all_tied_weights_keys}
    injection = place_operators(model, deployment)
    try:
        layers = injection.session.layer_specs()
        rest |= _own_experts(loader, injection, dtypes)
    finally:
        injection.session.close()
    manifest_entries: dict[str, Any] = {"experts": None, "layers": [], "dense": None, "linears": []}
    if layers:
        header = packed.describe(layers, [identity])
        with packed.fill(place, layers, header) as store:
            pack_experts(store, loader.sources, loader.shapes, show)
        manifest_entries |= {"experts": packed.file_name(header), "layers": header["layers"]}
    if parts.linears.entries:
        records = parts.linears.pack(model, loader.shapes, dtypes, show)
        header = packed_dense.describe(parts.linears, [identity])
        packed_dense.write(place, parts.linears, records, header)
        file = packed_dense.path_in(place, parts.linears, header)
        manifest_entries |= {"dense": file.name, "linears": header["linears"]}
    _save(rest, place / SINGLE_NAME)
    _write_config(loader, place)
    _copy_tokenizer(loader, place)
    Manifest(
        identity,
        str(deployment.model or "the demo model"),
        deployment.cpu.expert_dtype,
        deployment.cpu.dense_dtype,
        **manifest_entries,
    ).write(place)
    write_checksums(place, show)


def _own_experts(loader: Loader, injection: Injection, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Experts whole where the rules leave the model's own module in place."""
    found: dict[str, torch.Tensor] = {}
    for source in (source for source in loader.sources if source.path not in injection.originals):
        keys = {f"{source.path}.{name}" for name in source.parameters}
        for conversion in source.parameters.values():
            found |= read_checked(conversion, loader.shapes, dtypes, keys)
    return found


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raises OSError (safetensors has an error of its own for a disk that is full)."""
    from safetensors import SafetensorError

    try:
        save_file({key: _alone(tensor) for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own: the format takes no parts of others."""
    whole = tensor.detach().contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def _write_config(loader: Loader, place: Path) -> None:
    """config.json with every entry, defaults too: what it leaves unsaid could be read otherwise elsewhere."""
    text = loader.model.config.to_json_string(use_diff=False)
    (place / CONFIG_NAME).write_text(text, encoding="utf-8")


def _copy_tokenizer(loader: Loader, place: Path) -> None:
    """And what else belongs to a model directory; of a GGUF file the tokenizer that is in it, if it has one."""
    path = model_path(loader.deployment.model)
    if path.is_file():
        try:
            load_tokenizer(path).save_pretrained(place)
        except ModelError:  # such a file is loaded without, too; `Converted.has_tokenizer` tells
            return
        return
    for pattern in COPIED:
        for file in path.glob(pattern):
            if file.is_file() and file.name not in NOT_COPIED and not file.name.endswith(".index.json"):
                (place / file.relative_to(path)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place / file.relative_to(path))


def _described(target: Path, loader: Loader, *, is_new: bool) -> Converted:
    n_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    cpu = loader.deployment.cpu
    has_tokenizer = any(target.glob("tokenizer*")) or any(target.glob("*.model"))
    return Converted(str(target), cpu.expert_dtype, cpu.dense_dtype, n_bytes, is_new, has_tokenizer)
