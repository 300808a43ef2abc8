"""What keys and values on disk are of: all that they depend on, and nothing else."""

import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hybrimoe.cli.shared.states import prefix_settings, states_identity, times_file
from hybrimoe.config.deploy import load_config
from hybrimoe.demo import demo_model_path


def test_the_identity_follows_what_keys_and_values_depend_on(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"1")
    (adapter / "adapter_config.json").write_text("{}")

    def identity(config=None, **settings):
        return states_identity(load_config(config or {}, **settings))

    plain = identity()
    same = (
        {"server.port": 9000}, {"server.prefix_cache_disk": "1GiB"}, {"memory.kv": "1GiB"}, {"memory.gpu_experts": 3},
        {"generation.speculate": True}, {"scheduler.policy": "static"},
    )  # fmt: skip
    for settings in same:
        assert identity(**settings) == plain, settings
    others = (
        {"cpu.expert_dtype": "int4"}, {"cpu.dense_dtype": "int8"}, {"memory.kv_dtype": "int8"}, {"lossy": "skip"},
        {"rope": {"scaling": "yarn", "factor": 2}}, {"rope": {"scaling": "linear", "factor": 2}},
        {"rope": {"scaling": "yarn", "factor": 4}}, {"rope": {"scaling": "none"}},
        {"rope": {"scaling": "yarn", "factor": 2, "original_context": 9}},
        {"accelerator": "emulated"}, {"adapters": [str(adapter)]}, {"adapters": [f"{adapter}:0.5"]},
    )  # fmt: skip
    assert len({plain, *(identity(**settings) for settings in others)}) == len(others) + 1
    before, facts = identity(adapters=[str(adapter)]), weights.stat()
    weights.write_bytes(b"2")
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert identity(adapters=[str(adapter)]) != before, "other weights of the same name, size and time"


def doubled(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({key: 2 * value for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def of_another_mean(folder):
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.6, 0.5, 0.5]}')


@pytest.mark.parametrize(
    ("file", "change"), [("model.safetensors", doubled), ("preprocessor_config.json", of_another_mean)]
)
def test_other_contents_of_the_same_name_size_and_time_are_another_model(tmp_path, file, change):
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    before, facts = states_identity(load_config({"model": str(folder)})), (folder / file).stat()
    change(folder)
    os.utime(folder / file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (folder / file).stat().st_size == facts.st_size
    assert states_identity(load_config({"model": str(folder)})) != before


def test_the_folder_is_the_chosen_one_or_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    assert prefix_settings(load_config({})).disk is None
    for given, folder in ((None, tmp_path / "prefixes"), (str(tmp_path / "own"), tmp_path / "own")):
        settings = {"server": {"prefix_cache_disk": "1GiB", "prefix_cache_folder": given}}
        disk = prefix_settings(load_config(settings)).disk
        assert disk is not None
        assert (disk.folder, str(disk.size)) == (folder, "1GiB")


def test_times_of_prompts_are_kept_by_all_that_they_depend_on(monkeypatch):
    def path(**settings):
        kept = times_file(load_config({"accelerator": "none", **settings}))
        return None if kept is None else kept.path

    plain = path()
    assert plain is not None
    assert plain == path()
    assert plain != path(cpu={"threads": 1})
    assert plain != path(memory={"host": "4GiB"})
    assert plain != path(memory={"kv": "1GiB"})
    assert path(server={"max_stall_ms": 50}) == plain, "the times stay, the part that fits them changes"
    assert path(accelerator="emulated") is None
    monkeypatch.setattr("hybrimoe.machine.facts.cpu_model", lambda: "another CPU")
    assert path() != plain
