"""`hybrimoe serve` before it serves: what is missing is told before a model is loaded. The API has its own tests."""

import socket
import sys

import pytest


@pytest.mark.parametrize("package", ["uvicorn", "fastapi", "prometheus_client"])
def test_without_the_extra_the_command_says_which_to_install(hybrimoe, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = hybrimoe("serve")
    assert result.code == 1
    assert "pip install 'hybrimoe[serve]'" in " ".join(result.err.split())


def test_a_port_that_is_taken_is_told(hybrimoe):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = hybrimoe("serve", "--port", port)
    assert result.code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in " ".join(result.err.split())


def test_an_address_that_is_not_of_this_machine_is_told(hybrimoe):
    result = hybrimoe("serve", "--host", "203.0.113.7", "--port", "0")
    assert result.code == 2
    assert "203.0.113.7" in result.err


def test_a_port_outside_the_range_is_wrong_usage(hybrimoe):
    assert hybrimoe("serve", "--port", "70000").code == 2
