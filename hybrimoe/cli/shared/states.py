"""What a deployment keeps of prompts and replies, and the hash by which keys and values of one model are told apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.cli.shared.opening import OpenModel
    from hybrimoe.config.deploy import DeployConfig
    from hybrimoe.generation.prefix.blocks import PrefixTree
    from hybrimoe.generation.prefix.budget import PrefixSettings
    from hybrimoe.generation.prompts.parts import TimesFile
    from hybrimoe.server.slots import SlotFiles

KEEP_SECONDS = 5.0
"""Time at the end of a command for what is to be kept on disk."""
BUDGETS = ("gpu_experts", "host", "disk", "kv")
"""Of the section `memory`: sizes, which change where something lies and not what it is."""


def prefix_settings(config: DeployConfig) -> PrefixSettings:
    """Where a deployment keeps what prompts and replies computed."""
    from cpu_kernels.jit.cache_dir import cache_home
    from hybrimoe.generation.prefix.budget import DiskSettings, PrefixSettings

    server = config.server
    if server.prefix_cache_disk.kind == "none":
        return PrefixSettings(server.prefix_cache)
    folder = Path(server.prefix_cache_folder or cache_home() / "prefixes").expanduser()
    return PrefixSettings(server.prefix_cache, DiskSettings(folder, server.prefix_cache_disk, states_identity(config)))


def slot_files(name: str, config: DeployConfig) -> SlotFiles | None:
    """Where a server saves slots of its model `name`; None where the deployment names no folder."""
    from hybrimoe.server.slots import SlotFiles

    if config.server.slot_save_path is None:
        return None
    return SlotFiles(Path(config.server.slot_save_path).expanduser(), states_identity(config), name)


def times_file(config: DeployConfig) -> TimesFile | None:
    """Where the times of parts of prompts are kept: by the model, how it runs here, and this machine. None for models
    with work on an accelerator: which it is, and what else it does, is not known before it is open."""
    import torch

    from cpu_kernels.host.isa import detect
    from cpu_kernels.jit.cache_dir import cache_home
    from hybrimoe.config.runtime import choose_accelerators
    from hybrimoe.generation.prompts.parts import TimesFile
    from hybrimoe.machine.facts import cpu_model
    from scheduler.compiled import source_stamp

    names = choose_accelerators(config.accelerator)
    if any(name != "none" and (name != "auto" or torch.accelerator.is_available()) for name in names):
        return None
    more = {
        "memory": config.as_dict()["memory"], "cpu": cpu_model(), "cores": os.cpu_count(), "isa": detect().isa.name,
        "threads": torch.get_num_threads(), "sources": source_stamp("hybrimoe", "cpu_kernels", "scheduler"),
    }  # fmt: skip
    stamp = states_identity(config, prompt_times=more)
    return TimesFile(cache_home() / f"prompt-times-{stamp[:16]}.json")


@contextmanager
def kept_prefixes(opened: OpenModel, *, on_disk_only: bool = False) -> Iterator[PrefixTree | None]:
    """The prefix cache of an open model; what is not on disk yet gets there when the block ends.

    on_disk_only: none without a disk level, for whoever has one prompt.
    """
    from hybrimoe.generation.prefix.budget import prefix_tree

    generator, settings = opened.generator, prefix_settings(opened.config)
    if on_disk_only and settings.disk is None:
        yield None
        return
    tree = prefix_tree(generator.model, settings, generator.kv_bytes or 0)
    try:
        yield tree
    finally:
        if tree is not None:
            tree.close(KEEP_SECONDS)


def states_identity(config: DeployConfig, **more: Any) -> str:
    """A hash of all that the keys and values of a text depend on, in a model as it runs here: its weights, and how they
    are stored and computed. Budgets, policies that lose nothing, and the server's settings do not count.

    more: further things that count, as JSON takes them.
    """
    import torch
    import transformers

    from hybrimoe.checkpoint.adapters.settings import CONFIG_NAME, WEIGHTS_NAME, adapter_folder
    from hybrimoe.checkpoint.source import model_path, read_config_dict
    from hybrimoe.checkpoint.weights import weight_stamps
    from hybrimoe.compat import PROCESSOR_FILES
    from hybrimoe.config.adapters import parse_adapter
    from hybrimoe.generation.saved.sessions import identity_of

    path = model_path(config.model)
    adapters = [adapter_folder(parse_adapter(adapter)) for adapter in config.adapters]
    small = [path / name for name in PROCESSOR_FILES]
    small += [folder / name for folder in adapters for name in (CONFIG_NAME, WEIGHTS_NAME)]
    small += [Path(config.rules).expanduser()] if isinstance(config.rules, str) else []
    deployment = {key: value for key, value in config.as_dict().items() if key not in ("server", "generation", "model")}
    deployment["memory"] = {key: value for key, value in deployment["memory"].items() if key not in BUDGETS}
    deployment["scheduler"] = deployment["scheduler"].get("lossy")
    return identity_of(
        {
            "config": read_config_dict(path),
            "weights": weight_stamps(path),
            "files": [_sha256(file) for file in small if file.is_file()],
            "deployment": deployment,
            "versions": [torch.__version__, transformers.__version__],
            **more,
        }
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
