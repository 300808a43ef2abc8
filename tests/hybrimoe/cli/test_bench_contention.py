"""`hybrimoe bench contention`."""

import json

import pytest

from hybrimoe.bench.contention import Contention, busy_loops


@pytest.mark.slow
def test_the_share_of_the_idle_speed_is_told(hybrimoe):
    result = hybrimoe("bench", "contention", "--quick", "--loops", "1", "--accelerator", "none", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["loops"] == 1
    assert len(found["idle_ms"]["rounds"]) == len(found["busy_ms"]["rounds"]) == 2
    share = found["idle_ms"]["median"] / found["busy_ms"]["median"]
    assert found["share_of_idle_speed"] == pytest.approx(share)
    loss = 1 - found["spinning_ms"]["median"] / found["idle_ms"]["median"]
    assert found["idle_loss"] == pytest.approx(loss)


@pytest.mark.slow
def test_the_table(hybrimoe):
    shown = hybrimoe("bench", "contention", "--quick", "--rounds", "1", "--new-tokens", "3", "--accelerator", "none")
    assert shown.code == 0, shown.err
    assert "of the idle speed is kept" in " ".join((shown.out + shown.err).split())


def test_share_and_loss() -> None:
    found = Contention(2, (10.0, 12.0, 90.0), (24.0, 24.0, 20.0), (9.0, 9.0, 10.0))
    assert found.share == 0.5
    assert found.idle_loss == 0.25


def test_loops_end_with_the_block() -> None:
    with busy_loops(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.returncode is not None for process in processes)
