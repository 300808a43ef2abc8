"""The files of a training run: settings, tokenizer, checkpoint, metrics. Every write is atomic or append-only."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hybrimoe.errors import CheckpointError, ConfigError


class RunFiles:
    """Paths below the run directory, and how each is written."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.settings = directory / "settings.json"
        self.tokenizer = directory / "tokenizer"
        self.checkpoint = directory / "checkpoint.pt"
        self.metrics = directory / "metrics.jsonl"
        self.finish = directory / "finish"
        self.model = directory / "model"

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Records what the run was started with."""
        _replace(self.settings, json.dumps(settings, indent=2).encode() + b"\n")

    def check_settings(self, settings: Mapping[str, Any], may_differ: frozenset[str]) -> None:
        """Refuses to continue a run with settings that would compute something else.

        Raises:
            ConfigError: names the first setting, other than those in `may_differ`, that is not what the run has.
        """
        earlier = json.loads(self.settings.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name not in may_differ and earlier.get(name) != value:
                raise ConfigError(
                    f"the run in {self.directory} was started with {name}={earlier.get(name)}, found {value}; "
                    f"continue with the same value or choose another --out"
                )

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint; a stop at any moment leaves either the old or the new one."""
        temporary = self.checkpoint.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None if the run has none.

        Raises:
            CheckpointError: the file is not a whole checkpoint.
        """
        if not self.checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"expected a whole training checkpoint in {self.checkpoint}, found one that does not load ({error}); "
                f"restore it, or remove it to start the run again"
            ) from error
        return state

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one JSON line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def drop_metrics_after(self, step: int) -> None:
        """Forgets records of steps that the checkpoint does not contain: they will be trained again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        _replace(self.metrics, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
