"""``GET /metrics``: the server's figures for Prometheus, under our names and under vLLM's.

Dashboards made for vLLM then work as they are. Each scrape has a registry of its own, so two
servers in one process share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from api.figures import Figures, Histogram
from api.state import ServerState
from api.stats import EngineFigures, ask_engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def metrics(request: Request) -> Response:
    """Everything there is to count, as text. The engine is asked how full its cache is."""
    state: ServerState = request.app.state.server
    engine = await ask_engine(state)
    registry = CollectorRegistry()
    registry.register(FigureCollector(state.model_names[0], state.running.figures, engine))
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE})


@dataclass(frozen=True, slots=True)
class FigureCollector(Collector):
    """Makes metric families of figures when it is asked; keeps nothing."""

    model: str
    figures: Figures
    engine: EngineFigures

    def collect(self) -> Iterator[Metric]:
        figures, engine = self.figures, self.engine
        yield from self._gauges(
            "num_requests_running", "Sequences that are being worked on.", engine.num_running
        )
        yield from self._gauges(
            "num_requests_waiting", "Sequences that wait for their turn.", engine.num_waiting
        )
        yield from self._gauges(
            "kv_cache_usage_perc", "Pages of the KV cache in use; 1 is all.", engine.usage
        )
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts.", figures.num_prompt_tokens),
            ("prompt_tokens_cached", "Of those, found in the cache.", figures.num_cached_tokens),
            ("prefix_cache_queries", "Tokens looked for in the cache.", figures.num_prompt_tokens),
            ("prefix_cache_hits", "Tokens found in the cache.", figures.num_cached_tokens),
            ("generation_tokens", "Tokens of answers.", figures.num_generation_tokens),
            ("num_preemptions", "Sequences that had to yield.", figures.num_preemptions),
        ):
            yield from self._counters(name, text, count)
        yield self._labelled(
            "fathom_requests", "Requests that are over, by how.", "outcome", figures.outcomes
        )
        for prefix in ("fathom_", "vllm:"):
            yield self._labelled(
                f"{prefix}request_success",
                "Choices that came to an end, by why.",
                "finished_reason",
                figures.finish_reasons,
            )
        yield self._counter(
            "fathom_engine_restarts", "Engines that were replaced.", engine.num_restarts
        )
        for name, text, histogram in (
            (
                "time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                figures.first_token_seconds,
            ),
            (
                "inter_token_latency_seconds",
                "Between two tokens of one answer.",
                figures.token_interval_seconds,
            ),
            (
                "e2e_request_latency_seconds",
                "From a request's arrival to its end.",
                figures.request_seconds,
            ),
            ("request_queue_time_seconds", "Before the first step.", figures.queue_seconds),
            (
                "request_prefill_time_seconds",
                "From the first step to the first token.",
                figures.prefill_seconds,
            ),
            (
                "request_decode_time_seconds",
                "From the first token to the last.",
                figures.decode_seconds,
            ),
            ("request_prompt_tokens", "Tokens of a prompt.", figures.prompt_tokens),
            ("request_generation_tokens", "Tokens of an answer.", figures.generation_tokens),
        ):
            yield from self._histograms(name, text, histogram)

    def _gauges(self, name: str, text: str, value: float) -> Iterator[Metric]:
        for prefix in ("fathom_", "vllm:"):
            family = GaugeMetricFamily(f"{prefix}{name}", text, labels=["model_name"])
            family.add_metric([self.model], value)
            yield family

    def _counters(self, name: str, text: str, count: int) -> Iterator[Metric]:
        for prefix in ("fathom_", "vllm:"):
            yield self._counter(f"{prefix}{name}", text, count)

    def _counter(self, name: str, text: str, count: int) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], count)
        return family

    def _labelled(self, name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", label])
        for value, count in sorted(counts.items()):
            family.add_metric([self.model, value], count)
        return family

    def _histograms(self, name: str, text: str, histogram: Histogram) -> Iterator[Metric]:
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
        for prefix in ("fathom_", "vllm:"):
            family = HistogramMetricFamily(f"{prefix}{name}", text, labels=["model_name"])
            family.add_metric([self.model], buckets, histogram.total)
            yield family
