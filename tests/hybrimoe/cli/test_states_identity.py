"""What keys and values on disk are of: all that they depend on, and nothing else."""

import os

from hybrimoe.cli.common_model import prefix_settings, states_identity
from hybrimoe.config.deploy import load_config


def test_the_identity_follows_what_keys_and_values_depend_on(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"1")

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
        {"accelerator": "emulated"}, {"adapters": [str(adapter)]}, {"adapters": [f"{adapter}:0.5"]},
    )  # fmt: skip
    assert len({plain, *(identity(**settings) for settings in others)}) == len(others) + 1
    before = identity(adapters=[str(adapter)])
    os.utime(weights, ns=(1, 1))
    assert identity(adapters=[str(adapter)]) != before, "other weights under the same name"


def test_the_folder_is_the_chosen_one_or_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    assert prefix_settings(load_config({})).disk is None
    for given, folder in ((None, tmp_path / "prefixes"), (str(tmp_path / "own"), tmp_path / "own")):
        settings = {"server": {"prefix_cache_disk": "1GiB", "prefix_cache_folder": given}}
        disk = prefix_settings(load_config(settings)).disk
        assert disk is not None
        assert (disk.folder, str(disk.size)) == (folder, "1GiB")
