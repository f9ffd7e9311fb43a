"""`/metrics` against what a handful of requests did, read by Prometheus' own parser; timings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.app import ServerState
from api.figures import Figures, Histogram, Rate
from api.keys import KeyStore
from runtime import FinishReason, Tokenizer
from tests.api.scripted import (
    ScriptedEngine,
    engine_of,
    in_background,
    post,
    scripted_state,
    serve,
    wait_until,
)

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = {**HELLO, "stream": True}


class Scrape:
    """One answer of `/metrics`."""

    def __init__(self, base: str, path: str = "/metrics") -> None:
        answer = httpx.get(base.removesuffix("/v1") + path, verify=False)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        self.families = {
            family.name: family for family in text_string_to_metric_families(answer.text)
        }
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __getitem__(self, name: str) -> float:
        return self.get(name)

    def get(self, name: str, **labels: str) -> float:
        return self.samples[name, *sorted({**labels, "model_name": "fathom-tiny"}.items())]


def over(base: str, count: int) -> Scrape:
    """The scrape once ``count`` requests are over: they are counted after their answers."""
    scrapes: list[Scrape] = []

    def ended() -> bool:
        scrapes.append(Scrape(base))
        samples = scrapes[-1].samples.items()
        return sum(value for key, value in samples if key[0] == "fathom_requests_total") >= count

    wait_until(ended)
    return scrapes[-1]


def test_the_figures_are_those_of_the_answers(base: str, engine: ScriptedEngine) -> None:
    engine.say("welcome to you")
    engine.counts = {
        "num_pages": 1024,
        "num_free_pages": 768,
        "num_cached_pages": 5,
        "num_preemptions": 3,
    }
    engine.num_restarts = 2
    engine.num_cached = 2
    usages = [post(base, HELLO).json()["usage"], post(base, {**HELLO, "n": 2}).json()["usage"]]
    usages.append(post(base, {**HELLO, "max_tokens": 3}).json()["usage"])
    streamed = post(base, {**STREAM, "stream_options": {"include_usage": True}}).text
    usages.append(json.loads(streamed.split("data: ")[-2])["usage"])
    assert post(base, {**HELLO, "temperature": 9}).status_code == 400
    scrape = over(base, 5)

    for prefix in ("fathom_", "vllm:"):
        for name in ("prompt_tokens", "generation_tokens"):
            total = sum(usage[name.replace("generation", "completion")] for usage in usages)
            assert scrape[f"{prefix}{name}_total"] == total
            assert scrape[f"{prefix}request_{name}_sum"] == total
            assert scrape[f"{prefix}request_{name}_count"] == 4
        assert scrape[f"{prefix}prompt_tokens_cached_total"] == 8
        assert scrape[f"{prefix}prefix_cache_hits_total"] == 8
        assert scrape[f"{prefix}kv_cache_usage_perc"] == 0.25
        assert scrape[f"{prefix}num_preemptions_total"] == 3
        assert scrape[f"{prefix}num_requests_running"] == 0
        assert scrape.get(f"{prefix}request_success_total", finished_reason="stop") == 4
        assert scrape.get(f"{prefix}request_success_total", finished_reason="length") == 1
        for name in (
            *("time_to_first_token_seconds", "e2e_request_latency_seconds"),
            *("request_queue_time_seconds", "request_prefill_time_seconds"),
        ):
            assert scrape[f"{prefix}{name}_count"] == 4, name
            assert 0 <= scrape[f"{prefix}{name}_sum"] < 40, name
        # every token but the first of each of five choices came after another
        num_later = sum(usage["completion_tokens"] for usage in usages) - 5
        assert 0 < scrape[f"{prefix}inter_token_latency_seconds_count"] <= num_later
    assert scrape.get("fathom_requests_total", outcome="ok") == 4
    assert scrape.get("fathom_requests_total", outcome="decimal_above_max_value") == 1
    assert scrape["fathom_engine_restarts_total"] == 2

    for family in scrape.families.values():
        assert family.documentation
        if family.type == "histogram":
            buckets = [each.value for each in family.samples if each.name.endswith("_bucket")]
            assert all(a <= b for a, b in pairwise(buckets))
            (count,) = [each.value for each in family.samples if each.name.endswith("_count")]
            assert buckets[-1] == count


def test_what_runs_is_seen_and_what_went_wrong_is_counted(
    base: str, engine: ScriptedEngine
) -> None:
    engine.say("and so on " * 50)
    engine.seconds_per_token = 0.02

    def leave_early() -> None:
        client = httpx.Client(verify=False)
        with client.stream("POST", f"{base}/chat/completions", json=STREAM) as answer:
            lines = answer.iter_lines()
            for _ in range(9):
                next(lines)
            assert Scrape(base)["vllm:num_requests_running"] == 1
            assert Scrape(base)["fathom_generation_tokens_total"] > 0  # before the end
        client.close()

    with in_background(leave_early):
        pass
    scrape = over(base, 1)
    assert scrape.get("fathom_requests_total", outcome="client_gone") == 1
    assert scrape["fathom_generation_tokens_total"] < len(engine.token_ids)
    engine.seconds_per_token = 0
    engine.fails_with = FinishReason.NOT_FINITE
    engine.say("half", stop=False)
    assert post(base, HELLO).status_code == 500
    assert over(base, 2).get("fathom_requests_total", outcome="not_finite") == 1


@pytest.mark.parametrize("engine_state", ["loading", "restarting", "failing", "stopped"])
def test_an_engine_that_is_away_hides_nothing(
    base: str, engine: ScriptedEngine, engine_state: str
) -> None:
    engine.say("hi")
    post(base, HELLO)
    over(base, 1)
    engine.state = engine_state
    scrape = Scrape(base, "/v1/metrics")
    assert scrape["fathom_kv_cache_usage_perc"] == 0
    assert scrape["fathom_generation_tokens_total"] == len(engine.token_ids)


def test_two_servers_share_no_figures(tokenizer: Tokenizer) -> None:
    one, other = scripted_state(tokenizer), scripted_state(tokenizer)
    engine_of(one).say("hi")
    with serve(one) as first, serve(other) as second:
        post(first, HELLO)
        assert over(first, 1)["fathom_generation_tokens_total"] > 0
        assert Scrape(second)["fathom_generation_tokens_total"] == 0


def test_a_key_is_needed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = KeyStore.open(tmp_path / "home" / "keys.db")
    headers = {"authorization": f"Bearer {store.create('prometheus')}"}
    with serve(replace(scripted_state(tokenizer), keys=store)) as base:
        assert httpx.get(f"{base}/metrics").status_code == 401
        answer = httpx.get(f"{base}/metrics", headers=headers)
    store.close()
    assert answer.status_code == 200
    assert "# TYPE vllm:num_requests_running gauge" in answer.text


def test_an_engine_that_was_replaced_counts_on() -> None:
    figures = Figures()
    for number, count, total in ((0, 3, 3), (0, 5, 5), (1, 0, 5), (1, 2, 7), (2, 9, 16)):
        figures.note_engine({"num_preemptions": count}, number)
        assert figures.num_preemptions == total


def test_a_value_on_a_bound_is_within_it() -> None:
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 7.5


def test_a_rate_is_of_the_last_five_seconds() -> None:
    now = 100.0
    rate = Rate(lambda: now)
    for step in range(100):
        now = 100 + step * 0.05
        rate.add(2)
    assert rate.per_second() == pytest.approx(40, rel=0.05)
    now += 2.5
    assert rate.per_second() == pytest.approx(20, rel=0.1)
    now += 10
    assert rate.per_second() == 0


# -- timings of one request ----------------------------------------------------------------------


TIMINGS = {
    *("queue_ms", "prompt_ms", "predicted_ms", "prompt_n", "cached_n", "predicted_n"),
    *("prompt_per_second", "predicted_per_second"),
}


@pytest.fixture
def slow(engine: ScriptedEngine) -> Iterator[ScriptedEngine]:
    engine.say("one two three")
    engine.first_token_seconds, engine.seconds_per_token = 0.2, 0.02
    engine.num_cached = 2
    return engine


def timings_of(text: str) -> list[dict[str, Any]]:
    """The timings in the chunks of a stream."""
    chunks = [json.loads(line) for line in text.split("data: ")[1:-1]]
    assert all("timings" not in chunk for chunk in chunks[:-1])
    return [chunk["timings"] for chunk in chunks if "timings" in chunk]


def test_timings_say_how_long_the_parts_took(base: str, slow: ScriptedEngine) -> None:
    answer = post(base, {**HELLO, "timings": True}).json()
    timings, usage = answer["timings"], answer["usage"]
    assert timings.keys() == TIMINGS
    assert timings["prompt_n"] + timings["cached_n"] == usage["prompt_tokens"]
    assert timings["cached_n"] == 2
    assert timings["predicted_n"] == usage["completion_tokens"] == len(slow.token_ids)
    assert timings["queue_ms"] >= 0
    assert timings["prompt_ms"] >= 199  # it sleeps as long
    assert timings["predicted_ms"] >= 19.9 * (len(slow.token_ids) - 1)
    assert timings["prompt_ms"] < 20_000
    rate = 1000 * timings["prompt_n"] / timings["prompt_ms"]
    assert timings["prompt_per_second"] == pytest.approx(rate, rel=0.01)
    rate = 1000 * (timings["predicted_n"] - 1) / timings["predicted_ms"]
    assert timings["predicted_per_second"] == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_has_timings_in_its_last_chunk(
    base: str, slow: ScriptedEngine, include_usage: bool
) -> None:
    slow.first_token_seconds = slow.seconds_per_token = 0
    body = {**STREAM, "n": 2, "stream_options": {"include_usage": include_usage}}
    (timings,) = timings_of(post(base, {**body, "timings_per_token": True}).text)
    assert timings["predicted_n"] == 2 * len(slow.token_ids)
    assert timings_of(post(base, body).text) == []


def test_a_header_asks_for_timings_too(base: str, engine: ScriptedEngine) -> None:
    engine.say("one two three")
    for value, asked in (("1", True), ("true", True), ("0", False), ("", False)):
        answer = post(base, HELLO, headers={"x-fathom-timings": value}).json()
        assert ("timings" in answer) == asked
    error = post(base, {**HELLO, "timings": "yes"}).json()["error"]
    assert (error["param"], error["code"]) == ("timings", "invalid_type")


def test_one_token_has_no_rate(base: str, slow: ScriptedEngine) -> None:
    timings = post(base, {**HELLO, "max_tokens": 1, "timings": True}).json()["timings"]
    assert (timings["predicted_ms"], timings["predicted_per_second"]) == (0, None)


# -- ids -----------------------------------------------------------------------------------------


def test_an_answer_is_found_by_the_clients_own_id(base: str, state: ServerState) -> None:
    engine_of(state).say("hi")
    mine = post(base, HELLO, headers={"x-request-id": "order-66"})
    assert mine.headers["x-request-id"] == "order-66"
    assert mine.json()["id"] == "chatcmpl-order-66"
    streamed = post(base, STREAM, headers={"x-request-id": "order-67"}).text
    assert streamed.count('"id":"chatcmpl-order-67"') == streamed.count("chat.completion.chunk")
    others = [post(base, HELLO) for _ in range(3)]
    for other in others:
        given = other.headers["x-request-id"].removeprefix("req_")
        assert other.json()["id"] == f"chatcmpl-{given}"
    assert len({other.json()["id"] for other in others}) == 3
