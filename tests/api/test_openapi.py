"""The document says what the server does: routes, requests one by one and at random, answers."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.app import ServerState, create_app
from api.keys import KeyStore
from runtime import FinishReason, Tokenizer
from tests.api.json_schema import Schema, mistake, resolve
from tests.api.scripted import ScriptedEngine, engine_of, scripted_state
from tests.api.test_chat_fields import HELLO, PASSING, PLACES, REFUSED

CHAT = "/v1/chat/completions"
JSON = "application/json"
BEYOND_SCHEMAS = {
    ("logit_bias", "invalid_value"),  # an id outside the vocabulary
    ("stop_token_ids", "invalid_value"),
    ("chat_template_kwargs", "invalid_value"),  # a name that the server sets
    ("chat_template_kwargs", "string_above_max_length"),  # its size as JSON
    ("messages", "context_length_exceeded"),
    ("response_format", "invalid_json_schema"),  # a schema or grammar that says nothing sensible
    ("response_format", "string_above_max_length"),  # of a schema as JSON
    ("tool_choice", "invalid_value"),  # a function that is none of the tools
    ("continue_final_message", "invalid_value"),  # of a last message that is a user's
    ("prompt", "invalid_value"),  # without tokens, or with ids outside the vocabulary
    ("prompt", "context_length_exceeded"),
    ("max_tokens", "integer_below_min_value"),  # 0 without echo
    ("best_of", "unsupported_value"),  # other than n
}
"""(field, code) of refusals that no schema can express; the document has them in words."""


class Client:
    """The application without a socket, in an event loop of its own."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.app = create_app(state)
        self.engine = engine_of(state)
        self.engine.say("Hello, 你好 🙂")
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(app=self.app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
        self.document: Schema = self.get("/openapi.json").json()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._runner.run(self._client.request(method, path, **options))

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.request("GET", path, headers=headers)

    def post(self, body: object, path: str = CHAT) -> httpx.Response:
        return self.request("POST", path, json=body)

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def wrong_request(self, body: object, path: str = CHAT) -> str | None:
        operation = self.document["paths"][path]["post"]
        return mistake(self.document, operation["requestBody"]["content"][JSON]["schema"], body)

    def check_answer(self, method: str, path: str, answer: httpx.Response) -> None:
        """Fails unless the document has this answer of this operation, body and headers."""
        operation = self.document["paths"][path][method]
        described = operation["responses"][str(answer.status_code)]
        if "$ref" in described:
            described = resolve(self.document, described["$ref"])
        for name, header in described["headers"].items():
            if resolve(self.document, header["$ref"]).get("required"):
                assert name in answer.headers
        content_type = answer.headers["content-type"].split(";")[0]
        schema = described["content"][content_type]["schema"]
        if content_type == JSON:
            assert mistake(self.document, schema, answer.json()) is None
            return
        events = [line for line in answer.text.split("\n\n") if line and line[0] != ":"]
        for event in events:
            data = event.removeprefix("data: ")
            assert mistake(self.document, schema, {"data": data}) is None
        assert "[DONE]" in events[-1] or "error" in events[-1]


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer) -> Iterator[Client]:
    client = Client(scripted_state(tokenizer))
    yield client
    client.close()


@pytest.fixture
def engine(client: Client) -> Iterator[ScriptedEngine]:
    """The client's engine, to be broken."""
    engine = client.engine
    before = dict(vars(engine))
    yield engine
    vars(engine).update(before)


def test_all_routes_and_no_others_are_described(client: Client) -> None:
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for route in client.app.router.routes
        for method in route.methods - {"HEAD"}
    }
    described = {
        (method, path.removeprefix("/v1"))
        for path, operations in client.document["paths"].items()
        for method in operations
    }
    assert served == described


def schemas_of(node: Any) -> Iterator[Schema]:
    if isinstance(node, dict):
        yield node
        for part in node.values():
            yield from schemas_of(part)
    elif isinstance(node, list):
        for part in node:
            yield from schemas_of(part)


def test_objects_are_open_or_closed_and_references_lead_somewhere(client: Client) -> None:
    num_objects = 0
    for schema in schemas_of(client.document):
        if schema.get("type") == "object" or "object" in list(schema.get("type", [])):
            num_objects += 1
            assert "additionalProperties" in schema, schema
        if isinstance(schema.get("$ref"), str):
            resolve(client.document, schema["$ref"])
    assert num_objects > 20


def test_a_key_is_needed_where_the_document_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = KeyStore.open(tmp_path / "home" / "keys.sqlite")
    secret = keys.create("ann")
    authorization = {"Authorization": f"Bearer {secret}"}
    state = replace(scripted_state(tokenizer), keys=keys)
    app = create_app(state)
    engine_of(state).say("Hello")

    async def answers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            found = await client.get("/openapi.json", headers=authorization)
            paths = found.json()["paths"]
            return [
                found,
                *[
                    await client.request(method, path.replace("{name}", "fathom-tiny"))
                    for path, operations in paths.items()
                    for method in operations
                ],
            ]

    found, *others = asyncio.run(answers())
    keys.close()
    document = found.json()
    assert document["security"] == [{"bearer": []}, {"apiKey": []}]
    assert document["components"]["securitySchemes"]["bearer"] == {
        "type": "http",
        "scheme": "bearer",
    }
    operations = [
        operation for methods in document["paths"].values() for operation in methods.values()
    ]
    for operation, answer in zip(operations, others, strict=True):
        is_open = operation.get("security") == []
        assert is_open == ("401" not in operation["responses"])
        assert is_open == (answer.status_code != 401), operation["operationId"]
        if not is_open:
            assert (
                mistake(document, document["components"]["schemas"]["Error"], answer.json()) is None
            )
            assert answer.headers["www-authenticate"] == "Bearer"


def test_no_key_is_asked_for_where_none_exists(client: Client) -> None:
    assert "security" not in client.document
    assert "securitySchemes" not in client.document["components"]
    assert "401" not in client.document["paths"][CHAT]["post"]["responses"]


def shown(value: object) -> str:
    return repr(value)[:40]


@pytest.mark.parametrize(("name", "value"), PASSING, ids=shown)
def test_what_the_server_takes_is_allowed(client: Client, name: str, value: Any) -> None:
    assert client.wrong_request({"messages": HELLO, name: value}) is None


@pytest.mark.parametrize(("name", "value", "code"), REFUSED, ids=shown)
def test_what_the_server_refuses_is_not_allowed(
    client: Client, name: str, value: Any, code: str
) -> None:
    if client.wrong_request({"messages": HELLO, name: value}) is None:
        assert (name, code) in BEYOND_SCHEMAS


def test_an_unused_switch_of_the_wrong_type_is_refused(client: Client) -> None:
    body = {"messages": HELLO, "enable_thinking": True, "chat_template_kwargs": {"thinking": "yes"}}
    assert client.wrong_request(body) is not None
    assert client.post(body).json()["error"]["param"] == "chat_template_kwargs.thinking"


@pytest.mark.parametrize("body", [body for body, *_ in PLACES], ids=shown)
def test_what_the_server_refuses_deeper_inside_is_not_allowed(
    client: Client, body: dict[str, Any]
) -> None:
    assert client.wrong_request(body) is not None


FULL: dict[str, Any] = {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 3}
WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
BODIES: list[dict[str, Any]] = [
    {"messages": HELLO},
    {"messages": HELLO, "max_tokens": 1},
    FULL,
    {**FULL, **WITH_USAGE},
    {"messages": HELLO, "stream": True},
    {"messages": HELLO, "model": "gpt-5"},
    {"messages": []},
    {"messages": [{"role": "user", "content": "hello " * 2000}]},
]


@pytest.mark.parametrize("body", BODIES, ids=shown)
def test_chat_answers_are_as_described(client: Client, body: dict[str, Any]) -> None:
    client.check_answer("post", CHAT, client.post(body))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dies", [False, True])
def test_broken_answers_are_as_described(
    client: Client, engine: ScriptedEngine, stream: bool, dies: bool
) -> None:
    engine.token_ids = engine.token_ids[:3]
    engine.dies, engine.fails_with = dies, FinishReason.ERROR
    answer = client.post({"messages": HELLO, "stream": stream})
    assert answer.status_code == (200 if stream else 503 if dies else 500)
    client.check_answer("post", CHAT, answer)


@pytest.mark.parametrize("state", ["loading", "ready", "restarting", "failing", "stopped"])
def test_answers_of_an_engine_in_any_state_are_as_described(
    client: Client, engine: ScriptedEngine, state: str
) -> None:
    engine.state = state
    ready = client.get("/ready")
    assert ready.status_code == (200 if state == "ready" else 503)
    client.check_answer("get", "/ready", ready)
    client.check_answer("post", CHAT, client.post({"messages": HELLO}))
    client.check_answer("get", "/v1/models", client.get("/v1/models"))
    client.check_answer("get", "/health", client.get("/health"))


@pytest.mark.parametrize("name", ["fathom-tiny", "deepseek-r1", "gpt-5", "a/b"])
def test_a_model_is_as_described(client: Client, name: str) -> None:
    client.check_answer("get", "/v1/models/{name}", client.get(f"/v1/models/{name}"))


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}])
def test_refused_sources_are_as_described(client: Client, headers: dict[str, str]) -> None:
    answer = client.get("/v1/models", **headers)
    assert answer.status_code in (403, 421)
    client.check_answer("get", "/v1/models", answer)


def test_a_broken_schema_is_noticed(client: Client) -> None:
    """The check of these tests itself, on answers that are almost right."""
    answer = client.post(FULL).json()
    schema = {"$ref": "#/components/schemas/ChatCompletion"}
    assert mistake(client.document, schema, answer) is None
    for place in (["usage"], ["choices", 0, "message", "content"], ["choices", 0, "logprobs"]):
        for wrong in (5, "x" if place[-1] != "content" else [], {}):
            changed = copy.deepcopy(answer)
            *path, last = place
            node = changed
            for part in path:
                node = node[part]
            node[last] = wrong
            assert mistake(client.document, schema, changed) is not None, (place, wrong)
    assert mistake(client.document, schema, {**answer, "more": 1}) is not None
    del answer["usage"]["total_tokens"]
    assert mistake(client.document, schema, answer) is not None


WORDS = [
    *["role", "user", "assistant", "tool", "text", "type", "content", "enabled", "effort"],
    *["function", "name", "arguments", "high", "none", "thinking", "5", "0", "", "fathom-tiny"],
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 8, 9, 16, 20, 21, 101, 2**31, 2**63, -(2**63) - 1, 10**400]),
    st.integers(),
    st.sampled_from([0.5, 1.0, 2.0000001, -2.5, 1e300, 5e-324, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
NAMES = st.one_of(st.sampled_from(WORDS), st.text(max_size=4))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(NAMES, inner, max_size=4),
    ),
    max_leaves=6,
)
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}],
    },
    {"role": "tool", "content": "5", "tool_call_id": "1"},
]
VALID: dict[str, list[Any]] = {"messages": [HELLO, CONVERSATION]}
for field_name, field_value in PASSING:
    VALID.setdefault(field_name, []).append(field_value)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A valid request in which a field and up to two values anywhere may be wrong."""
    names = draw(st.lists(st.sampled_from(sorted(VALID)), max_size=4, unique=True))
    body = {name: draw(st.sampled_from(VALID[name])) for name in sorted({"messages", *names})}
    body = copy.deepcopy(body)
    if names and draw(st.booleans()):
        body[names[0]] = draw(VALUES)
    for _ in range(draw(st.integers(0, 2))):
        change_somewhere(draw, body)
    return body


def change_somewhere(draw: st.DrawFn, body: dict[str, Any]) -> None:
    """Change, remove or add one value, at any depth."""
    node: Any = body
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys)) if keys else None
        inner = None if key is None else node[key]
        if not isinstance(inner, dict | list) or draw(st.booleans()):
            break
        node = inner
    action = draw(st.sampled_from(["change", "remove", "add"]))
    if action == "add" or key is None:
        if isinstance(node, dict):
            node[draw(NAMES)] = draw(VALUES)
        else:
            node.append(draw(VALUES))
    elif action == "change":
        node[key] = draw(VALUES)
    else:
        del node[key]


def disagreement(client: Client, body: dict[str, Any], path: str = CHAT) -> str | None:
    """What is wrong if the server refuses what the document allows, or takes what it forbids.

    Fails for a fault of the server and for an answer that is not described.
    """
    answer = client.post(body, path)
    assert answer.status_code < 500, answer.text
    client.check_answer("post", path, answer)
    assert client.engine.num_live == 0
    wrong = client.wrong_request(body, path)
    if answer.status_code == 200 or wrong is not None:
        return wrong if answer.status_code == 200 else None
    error = answer.json()["error"]
    field = (error["param"] or "").split(".")[0].split("[")[0]
    return None if (field, error["code"]) in BEYOND_SCHEMAS else str(error["message"])


KINDS: list[Any] = [
    *[None, True, 0, 1, -1, 0.5, 1.0, 2**70, 10**400, "x", "1", "", "x" * 256, "x" * 257],
    *[[], ["x"], [1], [None], {}, {"x": 1}, {"1": 1}, {"²": 1}, {"type": "x"}],
]


@pytest.mark.parametrize(
    ("path", "schema", "least", "num_fields"),
    [
        (CHAT, "ChatRequest", {"messages": HELLO}, 30),
        ("/v1/completions", "CompletionRequest", {"prompt": "hello"}, 25),
        ("/v1/tokenize", "TokenizeText", {"prompt": "hello"}, 5),
        ("/v1/detokenize", "DetokenizeRequest", {"tokens": [5]}, 1),
    ],
)
def test_every_field_with_every_kind_of_value(
    client: Client, path: str, schema: str, least: dict[str, Any], num_fields: int
) -> None:
    fields = resolve(client.document, f"#/components/schemas/{schema}")["properties"]
    assert len(fields) > num_fields
    bodies = [{**least, name: value} for name in fields for value in KINDS]
    found = {json.dumps(body): disagreement(client, body, path) for body in bodies}
    assert [item for item in found.items() if item[1]] == []


@settings(max_examples=300, deadline=None)
@given(bodies())
def test_random_requests_get_what_the_document_says(client: Client, body: dict[str, Any]) -> None:
    assert disagreement(client, body) is None
