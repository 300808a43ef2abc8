"""`hybrimoe serve` before it serves: what is missing is told before a model is loaded. The API has its own tests."""

import shutil
import socket
import ssl
import subprocess
import sys

import httpx
import pytest

from hybrimoe.cli.serve import check_tls
from hybrimoe.config.deploy import ServerConfig
from hybrimoe.server.http import HttpServer, listening
from hybrimoe.server.models import Models


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


@pytest.fixture
def certificate(tmp_path):
    """(certificate, key) for 127.0.0.1, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    place = ["-keyout", key, "-out", cert, "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, "req", "-x509", "-days", "2", *curve, *place], check=True, capture_output=True)
    return cert, key


def test_https_by_files(certificate):
    cert, key = certificate
    settings = ServerConfig(tls_cert_file=cert, tls_key_file=key)
    check_tls(settings)
    with listening("127.0.0.1", 0) as listener, HttpServer(Models({"x": None}), settings, [], listener) as http:
        assert http.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=cert)
        answer = httpx.get(f"{http.url}/api/version", verify=trusted)
        with pytest.raises(httpx.HTTPError):
            httpx.get(http.url.replace("https", "http"))
    assert answer.json()["version"]


def test_a_certificate_that_cannot_be_used_is_told_before_a_model_is_loaded(hybrimoe, certificate, tmp_path):
    cert, key = certificate
    (tmp_path / "no.pem").write_text("this is no key")
    for words, said in (
        (("--tls-cert-file", cert), "expected both"),
        (
            ("--tls-cert-file", cert, "--tls-key-file", tmp_path / "no.pem"),
            "expected a certificate and its private key",
        ),
        (("--tls-cert-file", tmp_path / "nothing", "--tls-key-file", key), "No such file"),
    ):
        result = hybrimoe("serve", *words)
        assert result.code == 2
        assert said in " ".join(result.err.split())
