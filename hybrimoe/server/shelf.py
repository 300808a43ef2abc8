"""Which models a deployment serves: its own, those of a folder, and those that it lists by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe.checkpoint.adapters.settings import check_adapters
from hybrimoe.checkpoint.gguf.file import first_parts
from hybrimoe.checkpoint.source import CONFIG_NAME, check_model
from hybrimoe.config.deploy import DeployConfig, read_config
from hybrimoe.errors import ConfigError, HybriMoEError

__all__ = ["DEMO", "deployments"]

DEMO = "demo"
"""Name of the model in the package."""


def deployments(deployment: DeployConfig) -> dict[str, DeployConfig]:
    """By the name in the API, the deployment's own model first: that of `model:`, or the demo where nothing is named.

    Raises ConfigError for a folder without models, two models of one name, a mistake in what an entry has of its own;
    ModelError, CheckpointError for a model that is not there.
    """
    server = deployment.server
    found: dict[str, DeployConfig] = {}
    if deployment.model is not None or server.models is None:
        found[server.name or deployment.model or DEMO] = deployment
    if server.models is None:
        return found
    listed = _of_folder(server.models) if isinstance(server.models, str) else server.models
    for name, entry in listed.items():
        if name in found:
            raise ConfigError(
                f"server.models: two models have the name {name!r}; name the deployment's own server.name"
            )
        found[name] = _merged(deployment, name, entry)
    if not found:
        raise ConfigError("server.models: expected a model by its name, found none")
    return found


def _of_folder(folder: str) -> dict[str, str]:
    """Its models by their names: folders with a config.json, folders with GGUF files, and GGUF files."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"server.models: no folder {path}; expected one with models, or a list of names")
    files = {file.stem: str(file) for file in first_parts(path)}
    inside = sorted(child for child in path.iterdir() if child.is_dir())
    folders = {child.name: str(child) for child in inside if (child / CONFIG_NAME).is_file()}
    for child in inside:
        if child.name not in folders:
            folders |= {file.stem: str(file) for file in first_parts(child)}
    if not folders and not files:
        raise ConfigError(
            f"server.models: {path} has no models; expected folders with {CONFIG_NAME} and weights, or GGUF files"
        )
    return dict(sorted((folders | files).items()))


def _merged(deployment: DeployConfig, name: str, entry: str | Mapping[str, Any]) -> DeployConfig:
    """The deployment with what an entry says instead."""
    own = {"model": entry} if isinstance(entry, str) else dict(entry)
    try:
        if not isinstance(own.get("model"), str):
            raise ConfigError("expected the key model, with a directory, a GGUF file or a hub id")
        if "models" in (own.get("server") or {}):
            raise ConfigError("server.models: a model has none of its own")
        own_model = deployment.model_copy(update={"rope": None})  # what stretches another model does not fit this one
        merged = read_config(own_model, **{"adapters": [], **own})  # nor do its adapters
        check_model(merged.model)
        check_adapters(merged.adapters)
        merged.check_scheduler()
    except HybriMoEError as error:
        raise ConfigError(f"server.models: {name}: {error}") from error
    return merged
