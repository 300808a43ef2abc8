"""The adapter_config.json of an adapter: where it lies, what of it counts for merging, and what is refused by name.

Nothing here imports torch: a wrong folder or method is noticed before the seconds that it takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError, listed, unreadable
from hybrimoe.checkpoint.source import is_hub_id
from hybrimoe.config.adapters import AdapterName, parse_adapter
from hybrimoe.errors import CheckpointError, ModelError
from hybrimoe.text_files import parse_json, read_text

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
TRAINED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that take a part out of the model's own weights, which the folder does not have."""
REFUSED = {
    "alora_invocation_tokens": "it works on some tokens only (aLoRA)",
    "arrow_config": "it routes between adapters (Arrow)",
    "kasa_config": "it changes the model's own weights (KaSA)",
    "layer_replication": "it repeats layers of the model",
    "lora_bias": "its lora_B has biases",
    "trainable_token_indices": "it trains single tokens",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "use_qalora": "its inputs are pooled (QA-LoRA)",
}
"""Settings that make something else than LoRA of an adapter, and why."""
MERGE_FIRST = "merge it with PEFT (model.merge_and_unload(), save_pretrained) and load the merged model"
TRANSPOSED_BEFORE = (0, 19, 1)
"""The release from which on PEFT takes stacked experts [E, out, in] as such; until then as [E, in, out]."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What of an adapter's configuration counts for merging it.

    scale: what people gave. rank, alpha and their patterns: as PEFT reads them. target_parameters: the names of
    parameters (stacked experts, routers) that are adapted directly. peft_version: that wrote it; () where unknown.
    """

    folder: Path
    scale: float
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    target_parameters: tuple[str, ...]
    base_model: str
    peft_version: tuple[int, ...]

    def rank_of(self, *names: str) -> int:
        """The rank for a module or parameter; names: how patterns may call it."""
        return int(_by_pattern(self.rank_pattern, names, self.rank))

    def scaling_of(self, rank: int, *names: str) -> float:
        """What B A is multiplied by for a module or parameter."""
        alpha = float(_by_pattern(self.alpha_pattern, names, self.alpha))
        return self.scale * alpha / (math.sqrt(rank) if self.use_rslora else rank)


def adapter_folder(name: AdapterName) -> Path:
    """The folder of an adapter; what looks like `owner/name` is fetched from the hub. Raises ModelError."""
    path = Path(name.path).expanduser()
    if (path / CONFIG_NAME).is_file():
        return path
    if path.is_dir():
        raise ModelError(f"{path} is no adapter: it has no {CONFIG_NAME}; expected a folder that PEFT has written")
    if is_hub_id(name.path):
        return _from_hub(name.path)
    raise ModelError(f"no adapter {path}: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a hub id")


def check_adapters(names: Iterable[str]) -> None:
    """Raises what `read_settings` raises: what a command asks before it imports torch."""
    for name in names:
        parsed = parse_adapter(name)
        if not is_hub_id(parsed.path):
            read_settings(parsed)


def read_settings(name: AdapterName) -> Settings:
    """The configuration of an adapter.

    Raises ModelError where there is none, CheckpointError where it is damaged or lacks its weights, and
    UnsupportedCheckpointError for a method other than LoRA and for variants of LoRA that are not merged.
    """
    folder = adapter_folder(name)
    file = folder / CONFIG_NAME
    try:
        found = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise CheckpointError(unreadable(file, error, "copy the adapter again")) from error
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise CheckpointError(f"{file} is no configuration of an adapter: it has no peft_type")
    _refuse(file, found)
    if not (folder / WEIGHTS_NAME).is_file():
        others = sorted(path.name for path in folder.glob("adapter_model.*"))
        what = f"has {listed(others)} but no" if others else "lacks"
        raise CheckpointError(f"{folder} {what} {WEIGHTS_NAME}; save the adapter with PEFT again, as safetensors")
    try:
        return _settings(folder, name.scale, found)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{file} is damaged: {error}; copy the adapter again") from error


def _settings(folder: Path, scale: float, found: Mapping[str, Any]) -> Settings:
    rank, alpha = int(found.get("r") or 0), float(found.get("lora_alpha") or 0)
    ranks = {str(re.compile(key).pattern): int(value) for key, value in (found.get("rank_pattern") or {}).items()}
    alphas = {str(re.compile(key).pattern): float(value) for key, value in (found.get("alpha_pattern") or {}).items()}
    if any(value < 1 for value in (rank, *ranks.values())):
        raise ValueError(f"r is {rank}, rank_pattern {ranks}: expected ranks of 1 or more")
    if not all(map(math.isfinite, (alpha, *alphas.values()))):
        raise ValueError(f"lora_alpha is {alpha}, alpha_pattern {alphas}: expected finite numbers")
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(found.get("peft_version") or ""))
    return Settings(
        folder, scale, rank, alpha, ranks, alphas, bool(found.get("use_rslora")), bool(found.get("use_dora")),
        bool(found.get("fan_in_fan_out")), tuple(str(name) for name in found.get("target_parameters") or ()),
        str(found.get("base_model_name_or_path") or "a model that it does not name"),
        () if version is None else tuple(map(int, version.groups())),
    )  # fmt: skip


def _refuse(file: Path, found: Mapping[str, Any]) -> None:
    """Raises UnsupportedCheckpointError for what is not LoRA as it is merged here."""
    kind = found["peft_type"]
    if kind != "LORA":
        raise UnsupportedCheckpointError(f"{file}: the adapter is {kind}; only LoRA is merged here: {MERGE_FIRST}")
    for name, why in REFUSED.items():
        if found.get(name):
            raise UnsupportedCheckpointError(f"{file}: {name} is set: {why}, which is not merged here; {MERGE_FIRST}")
    start = str(found.get("init_lora_weights") or "")
    if start.lower().startswith(TRAINED_BASE):
        raise UnsupportedCheckpointError(
            f"{file}: init_lora_weights is {start}, for which PEFT changes the model's own weights; save the adapter"
            " with path_initial_model_for_weight_conversion, which makes plain LoRA of it, or merge it with PEFT"
        )


def _by_pattern(patterns: Mapping[str, float], names: tuple[str, ...], otherwise: float) -> float:
    """The value of the first pattern that fits one of the names, as PEFT matches them."""
    for name in names:
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return otherwise


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"{hub_id} is neither a folder here nor an adapter that the hub gives: {error}") from error
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(f"{hub_id} is no adapter: it has no {CONFIG_NAME}")
    return folder
