"""OpenTelemetry traces of requests: a span each, with queue, prefill and decode of its replies below it.

Attributes follow the semantic conventions for generative AI; what is said is never among them. Spans are made when a
request has ended, from times that are measured anyway. OpenTelemetry is imported only where traces are wanted.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from hybrimoe.errors import MissingExtraError
from hybrimoe.generation import SamplingOptions

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

    from hybrimoe.server.worker import Job

__all__ = ["RequestTrace", "Traces", "open_traces"]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Variables that say where traces go; one of them switches traces on."""
SERVICE = "hybrimoe"
TEXT_PATHS = ("/v1/completions", "/completion", "/infill", "/api/generate")
"""Paths whose requests continue a text; all others are chats."""
SAMPLING = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "max_new_tokens": "gen_ai.request.max_tokens",
    "seed": "gen_ai.request.seed",
}
"""Options of a reply by their names in the conventions."""
UNSET = SamplingOptions()
NS_PER_US, NS_PER_S = 1_000, 1_000_000_000

log = logging.getLogger("hybrimoe.server")


def open_traces(endpoint: str | None) -> Traces | None:
    """Traces of this process; None where neither the deployment nor the environment asks for any.

    endpoint: `server.tracing`, where OTLP over HTTP is taken; None: by the variables of OpenTelemetry. Raises
    MissingExtraError for an endpoint without the extra `otel`; where only the environment, which may be meant for other
    programs, has one, the log says so.
    """
    if endpoint is None and not _environment_asks():
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        missing = MissingExtraError("otel", str(error))
        if endpoint is not None:
            raise missing from error
        log.warning("no traces, though the environment names an OpenTelemetry endpoint: %s", missing)
        return None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": SERVICE}
    provider = TracerProvider(resource=Resource.create(named))
    exporter = OTLPSpanExporter() if endpoint is None else OTLPSpanExporter(endpoint=endpoint)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Traces(provider)


def _environment_asks() -> bool:
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return not off and any(os.environ.get(name) for name in ENDPOINTS)


class Traces:
    """Where the spans of requests go."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self.tracer = provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    def of_client(self, request: Request) -> Context:
        """The client's own trace, where its header `traceparent` names one."""
        return self._propagator.extract(dict(request.headers))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class RequestTrace:
    """The trace of one request, told when it has ended. model: its name in the API."""

    def __init__(self, traces: Traces, request: Request, model: str) -> None:
        self._traces, self._model = traces, model
        self._context = traces.of_client(request)
        self._operation = "text_completion" if request.url.path in TEXT_PATHS else "chat"
        self._began_s = time.monotonic()
        self._ended = False

    def end(self, jobs: Sequence[Job], failure: BaseException | None = None) -> None:
        """Its replies have ended, or failed, or nobody waits for them any more. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        wall_ns = time.time_ns() - time.monotonic_ns()
        span = self._traces.tracer.start_span(
            f"{self._operation} {self._model}", self._context, SpanKind.SERVER, dict(self._attributes(jobs)),
            start_time=wall_ns + int(self._began_s * NS_PER_S),
        )  # fmt: skip
        if failure is not None:
            span.set_attribute("error.type", type(failure).__name__)
            span.set_status(Status(StatusCode.ERROR, str(failure)))
        below = set_span_in_context(span)
        for job in jobs:
            self._tell_of_job(job, below, wall_ns)
        span.end()

    def _attributes(self, jobs: Sequence[Job]) -> Iterator[tuple[str, Any]]:
        yield from (
            ("gen_ai.operation.name", self._operation),
            ("gen_ai.provider.name", SERVICE),
            ("gen_ai.request.model", self._model),
            ("gen_ai.response.model", self._model),
        )
        if not jobs:
            return
        options = jobs[0].options
        if len(jobs) > 1:
            yield "gen_ai.request.choice.count", len(jobs)
        for ours, theirs in SAMPLING.items():
            value = getattr(options, ours)
            if value != getattr(UNSET, ours):
                yield theirs, value
        if options.stop:
            yield "gen_ai.request.stop_sequences", list(options.stop)
        replies = [job.reply for job in jobs if job.reply is not None]
        yield "gen_ai.response.finish_reasons", [str(one.finish_reason or "interrupted") for one in replies]
        yield "gen_ai.usage.input_tokens", len(jobs[0].prompt_ids)
        yield "gen_ai.usage.cache_read.input_tokens", replies[0].n_reused if replies else 0
        yield "gen_ai.usage.output_tokens", sum(len(one.token_ids) for one in replies)

    def _tell_of_job(self, job: Job, below: Context, wall_ns: int) -> None:
        """Queue, prefill (to the first token) and decode (to the last one), as far as the reply came."""
        came_ns = wall_ns + int(job.submitted_s * NS_PER_S)
        reply = job.reply
        if reply is None:
            self._child("queue", below, came_ns, time.time_ns())
            return
        begun_ns = came_ns + int(job.waited_s * NS_PER_S)
        self._child("queue", below, came_ns, begun_ns)
        first_ns = begun_ns + int((reply.times.ttft_us or reply.times.prefill_us) * NS_PER_US)
        if first_ns > begun_ns:
            self._child("prefill", below, begun_ns, first_ns, {"gen_ai.usage.input_tokens": len(job.prompt_ids)})
        if reply.token_ids:
            last_ns = first_ns + int(reply.times.decode_us * NS_PER_US)
            self._child("decode", below, first_ns, last_ns, {"gen_ai.usage.output_tokens": len(reply.token_ids)})

    def _child(
        self, name: str, below: Context, begin_ns: int, end_ns: int, attributes: dict[str, int] | None = None
    ) -> None:
        span = self._traces.tracer.start_span(name, below, attributes=attributes, start_time=begin_ns)
        span.end(end_ns)
