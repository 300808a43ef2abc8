"""Traces of requests, as OpenTelemetry's exporter in memory gets them; none, and no import, where they are off."""

import asyncio
import sys

import pytest

from hybrimoe.errors import MissingExtraError
from hybrimoe.server.tracing import Traces, open_traces

CHAT = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5, "temperature": 0, "seed": 3}
TEXT = {"prompt": "It was", "max_tokens": 60, "temperature": 0}


@pytest.fixture
def traced(application):
    """`traced(**settings)`: an application with traces, and the spans that it has sent."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    def make(**settings):
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        app, served = application(traces=Traces(provider), **settings)
        return app, served, exporter.get_finished_spans

    return make


def by_parent(spans):
    """The requests' spans, each with those below it by name."""
    requests = [span for span in spans if span.name.split()[0] in ("chat", "text_completion")]
    return [
        (one, {span.name: span for span in spans if span.parent and span.parent.span_id == one.context.span_id})
        for one in requests
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_queue_prefill_and_decode(traced, calling, stream):
    app, _, spans = traced()
    assert calling(app)("POST", "/v1/chat/completions", {**CHAT, "stream": stream}).status_code == 200
    ((request, below),) = by_parent(spans())
    assert request.name == "chat tiny"
    told = dict(request.attributes)
    assert told.pop("gen_ai.usage.input_tokens") > 0
    assert told == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "hybrimoe", "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny", "gen_ai.request.temperature": 0.0, "gen_ai.request.max_tokens": 5,
        "gen_ai.request.seed": 3, "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.cache_read.input_tokens": 0, "gen_ai.usage.output_tokens": 5,
    }  # fmt: skip
    assert request.status.is_ok
    assert list(below) == ["queue", "prefill", "decode"]
    queue, prefill, decode = below.values()
    assert request.start_time <= queue.start_time <= queue.end_time == prefill.start_time
    assert prefill.start_time < prefill.end_time == decode.start_time < decode.end_time <= request.end_time
    assert decode.attributes["gen_ai.usage.output_tokens"] == 5
    assert "secret" not in "".join(span.to_json() for span in spans())


def test_replies_of_one_request_are_below_one_span_which_continues_the_clients_trace(traced, client):
    app, _, spans = traced(parallel=2)

    async def run():
        async with client(app) as http:
            trace = {"traceparent": f"00-{7:032x}-{9:016x}-01"}
            await http.post("/v1/completions", json={**TEXT, "max_tokens": 3, "n": 2}, headers=trace)

    asyncio.run(run())
    (request,) = [span for span in spans() if span.name == "text_completion tiny"]
    assert (request.context.trace_id, request.parent.span_id) == (7, 9)
    assert request.attributes["gen_ai.request.choice.count"] == 2
    assert request.attributes["gen_ai.usage.output_tokens"] == 6
    names = sorted(span.name for span in spans() if span is not request)
    assert names == 2 * ["decode"] + 2 * ["prefill"] + 2 * ["queue"]


def test_a_failure_and_a_client_that_leaves_are_errors(traced, calling, connect, generator, monkeypatch):
    app, _, spans = traced()
    with monkeypatch.context() as patch:
        patch.setattr(generator, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("a lane died")))
        assert calling(app)("POST", "/v1/completions", TEXT).status_code == 500

    async def leave():
        connection = connect(app, "/v1/completions", {**TEXT, "stream": True})
        request = asyncio.create_task(connection.run())
        while b"data" not in (await connection.sent.get()).get("body", b""):
            pass
        connection.left.set()
        await request

    asyncio.run(leave())
    failed, left = (request for request, _ in by_parent(spans()))
    assert (failed.attributes["error.type"], failed.status.is_ok) == ("RuntimeError", False)
    assert left.attributes["error.type"] == "ClientLeftError"
    assert left.attributes["gen_ai.usage.output_tokens"] >= 1


def test_without_an_endpoint_there_are_none_and_nothing_is_imported(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # an import would fail
    assert open_traces(None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert open_traces(None) is None, "the environment may be meant for other programs"
    with pytest.raises(MissingExtraError, match="otel"):
        open_traces("http://127.0.0.1:1/v1/traces")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.delitem(sys.modules, "opentelemetry.sdk.trace")
    assert open_traces(None) is None


def test_the_endpoint_of_the_environment_opens_them(monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="needs the extra otel")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    traces = open_traces(None)
    assert isinstance(traces, Traces)
    traces.close()
