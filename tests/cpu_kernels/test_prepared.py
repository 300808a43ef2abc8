"""The cache of prepared experts: bounds, order, and that rewritten records are seen."""

import numpy as np
import pytest

import cpu_kernels as ck
from cpu_kernels.backends.prepared import PreparedExperts, fingerprint, limit_bytes, shared_cache

SPEC = ck.ExpertSpec(64, 64, "int4")


@pytest.fixture
def records() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, SPEC.record_bytes)).astype(np.uint8)


def test_kept_until_the_limit_least_recent_first(records: np.ndarray) -> None:
    made: list[int] = []
    cache: PreparedExperts[int] = PreparedExperts(200)

    def get(index: int) -> int:
        def prepare() -> tuple[int, int]:
            made.append(index)
            return index, 100

        return cache.get(SPEC, records[index], prepare)

    assert [get(i) for i in (0, 1, 0, 1)] == [0, 1, 0, 1]
    assert made == [0, 1]
    get(0)
    get(2)  # 1 is the least recently used
    assert (len(cache), cache.used_bytes) == (2, 200)
    get(0)
    get(1)
    assert made == [0, 1, 2, 1]


def test_an_expert_larger_than_the_limit_is_kept_alone(records: np.ndarray) -> None:
    cache: PreparedExperts[str] = PreparedExperts(10)
    for record in records:
        assert cache.get(SPEC, record, lambda: ("big", 11)) == "big"
    assert (len(cache), cache.used_bytes) == (1, 11)


def test_a_rewritten_record_is_prepared_again(records: np.ndarray) -> None:
    cache: PreparedExperts[int] = PreparedExperts(1000)
    assert cache.get(SPEC, records[0], lambda: (1, 5)) == 1
    records[0, 100] ^= 1
    assert cache.get(SPEC, records[0], lambda: (2, 7)) == 2
    assert cache.get(SPEC, records[0], lambda: (3, 7)) == 2
    assert cache.used_bytes == 7


def test_fingerprint_sees_every_byte_and_moved_parts(records: np.ndarray) -> None:
    record, before = records[0], fingerprint(records[0])
    for place in (0, 1, record.size // 2, record.size - 1):
        record[place] ^= 0x10
        assert fingerprint(record) != before
        record[place] ^= 0x10
    assert fingerprint(record) == before
    assert fingerprint(np.roll(record, 64)) != before


def test_specs_of_one_address_are_apart(records: np.ndarray) -> None:
    cache: PreparedExperts[int] = PreparedExperts(1000)
    other = ck.ExpertSpec(64, 64, "int4", ck.Activation("gelu"))
    assert cache.get(SPEC, records[0], lambda: (1, 1)) == 1
    assert cache.get(other, records[0], lambda: (2, 1)) == 2


def test_one_cache_a_name_as_long_as_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIMOE_TEST_CACHE", "0.5")
    one = shared_cache("test", "HYBRIMOE_TEST_CACHE", 4)
    assert one.limit_bytes == 2**29
    assert shared_cache("test", "HYBRIMOE_TEST_CACHE", 4) is one
    del one
    monkeypatch.delenv("HYBRIMOE_TEST_CACHE")
    assert shared_cache("test", "HYBRIMOE_TEST_CACHE", 4).limit_bytes == 4 * 2**30


@pytest.mark.parametrize("text", ["lots", "-1", "nan", "inf"])
def test_a_wrong_size_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HYBRIMOE_TEST_CACHE", text)
    with pytest.raises(ck.BackendError, match=f"HYBRIMOE_TEST_CACHE='{text}' is not a size in GiB"):
        limit_bytes("HYBRIMOE_TEST_CACHE", 4)
