"""Raw requests: paths, methods, bodies, browsers. Whatever is wrong, the envelope is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest

from api.guard import MAX_BODY_BYTES, canonical_path
from runtime import Tokenizer
from tests.api.scripted import ScriptedEngine, engine_of, post, scripted_state, serve

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def error_of(response: httpx.Response) -> dict[str, str | None]:
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, str | None] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert response.headers["content-type"] == "application/json"
    return error


def test_models(client: openai.OpenAI, base: str) -> None:
    first = {
        "id": "fathom-tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "fathom",
        "permission": None,
        "root": "fathom-tiny",
        "parent": None,
        "max_model_len": 512,
    }
    alias = {**first, "id": "deepseek-r1"}
    assert httpx.get(f"{base}/models").json() == {"object": "list", "data": [first, alias]}
    assert [model.id for model in client.models.list()] == ["fathom-tiny", "deepseek-r1"]
    assert client.models.retrieve("deepseek-r1").to_dict() == alias
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_model_id_with_a_slash(tokenizer: Tokenizer) -> None:
    name = "deepseek-ai/DeepSeek-R1"
    with serve(replace(scripted_state(tokenizer), model_names=(name,))) as base:
        assert httpx.get(f"{base}/models/{name}").json()["id"] == name
        assert httpx.get(f"{base}/models/deepseek-ai%2FDeepSeek-R1").json()["id"] == name


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/models",
        "//models",
        "/v1//models",
        "/v1/models/",
        "/v1/v1/models",
        "//v1/models",
    ],
)
def test_paths_people_type(base: str, engine: ScriptedEngine, path: str) -> None:
    engine.say("ok")
    root = base.removesuffix("/v1")
    assert httpx.get(root + path).json()["object"] == "list"
    chat = httpx.post(root + path.replace("models", "chat/completions"), json=HELLO)
    assert chat.json()["object"] == "chat.completion"


def test_canonical_path() -> None:
    assert canonical_path("/") == canonical_path("") == canonical_path("/v1/") == "/"
    assert canonical_path("/models/v1") == "/models/v1"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/", "/v1", "/chat", "/v1/responses", "/%00"])
def test_unknown_urls(base: str, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        response = httpx.request(method, base.removesuffix("/v1") + path)
        assert response.status_code == 404
        assert error_of(response)["code"] == "unknown_url"


def test_wrong_methods(base: str) -> None:
    for method, path in (("GET", "/chat/completions"), ("POST", "/models"), ("PUT", "/models/x")):
        response = httpx.request(method, base + path)
        assert response.status_code == 405
        assert error_of(response)["code"] == "method_not_allowed"
        assert "allow" in response.headers


DEEP = 200_000
BODIES: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b'{"messages": NaN}',
    b'{"temperature": Infinity, "messages": [{"role": "user", "content": "x"}]}',
    b'{"temperature": -Infinity, "messages": []}',
    b'{"temperature": 1e999, "messages": []}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b"\xff\xfe{}",
    b'\xef\xbb\xbf{"messages": []}',
    json.dumps(HELLO).encode("utf-16"),
    json.dumps(HELLO).encode("utf-32-le"),
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    b'{"messages": [{"role": "user", "content": "\\uDE00\\uD83D"}]}',
    b'{"model": "\\uDE00"}',
    b'{"messages": [{"role": "user", "content": "a\nb"}]}',
    b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    b"[" * DEEP,
    b'{"messages": []} trailing',
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_bodies_that_are_not_strict_json(base: str, engine: ScriptedEngine, body: bytes) -> None:
    response = post(base, body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"
    assert engine.submitted == []


def test_escaped_pairs_are_good_text(base: str, engine: ScriptedEngine) -> None:
    engine.say("ok")
    assert post(base, b'{"messages": [{"role": "user", "content": "\\ud83d\\ude42"}]}').is_success
    prompt = b"".join(engine.tokenizer.token_bytes[i] for i in engine.submitted[0][0])
    assert "🙂" in prompt.decode()


def test_content_types(base: str, engine: ScriptedEngine) -> None:
    engine.say("ok")
    data = json.dumps(HELLO).encode()
    url = f"{base}/chat/completions"
    for good in ("application/json", "Application/JSON; charset=utf-8", None):
        headers = {} if good is None else {"content-type": good}
        assert httpx.post(url, content=data, headers=headers).status_code == 200
    for bad in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = httpx.post(url, content=data, headers={"content-type": bad})
        assert response.status_code == 400
        assert error_of(response)["code"] == "unsupported_content_type"


def test_the_body_limit_at_the_limit_and_one_beyond(base: str, client: openai.OpenAI) -> None:
    empty = b'{"messages": [], "x": ""}'
    padding = b"x" * (MAX_BODY_BYTES - len(empty))
    fitting = empty.replace(b'""', b'"' + padding + b'"')
    assert len(fitting) == MAX_BODY_BYTES
    assert error_of(post(base, fitting))["code"] == "empty_array"
    response = post(base, fitting + b" ")
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * (1 << 20)

    headers = {"content-type": "application/json"}
    streamed = httpx.post(f"{base}/chat/completions", content=chunks(), headers=headers)
    assert streamed.status_code == 413
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="deepseek-r1", messages=[{"role": "user", "content": "x" * (9 << 20)}]
        )
    assert caught.value.status_code == 413


def test_request_ids(base: str, client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.say("ok")
    assert (
        httpx.get(f"{base}/models", headers={"x-request-id": "abc"}).headers["x-request-id"]
        == "abc"
    )
    for bad in ("a b", "x" * 129, ""):
        made = httpx.get(f"{base}/nope", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made.startswith("req_")
    answer = client.chat.completions.with_raw_response.create(
        model="deepseek-r1", messages=[{"role": "user", "content": "hi"}]
    )
    assert str(answer.request_id).startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0


PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
    "access-control-request-private-network": "true",
}


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:5"])
def test_pages_of_this_machine_may_use_an_open_server(
    base: str, engine: ScriptedEngine, origin: str
) -> None:
    engine.say("ok")
    headers = {"origin": origin}
    preflight = httpx.options(f"{base}/chat/completions", headers={**headers, **PREFLIGHT})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == origin
    assert (
        preflight.headers["access-control-allow-headers"]
        == PREFLIGHT["access-control-request-headers"]
    )
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in preflight.headers
    for body in ({}, HELLO, {**HELLO, "stream": True}):
        response = post(base, body, headers=headers)
        assert response.headers["access-control-allow-origin"] == origin
        assert "origin" in response.headers["vary"].lower()
    assert "access-control-allow-origin" not in httpx.get(f"{base}/models").headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example"]
)
def test_other_pages_may_not_use_an_open_server(
    base: str, engine: ScriptedEngine, origin: str
) -> None:
    for response in (
        httpx.options(f"{base}/models", headers={"origin": origin, **PREFLIGHT}),
        post(base, HELLO, headers={"origin": origin}),
    ):
        assert response.status_code == 403
        assert error_of(response)["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
    assert engine.submitted == []


def test_an_open_server_answers_to_its_own_names_only(base: str) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1", ""):
        response = httpx.get(f"{base}/models", headers={"host": host})
        assert response.status_code in (400, 421), host
    assert httpx.get(f"{base}/models", headers={"host": "localhost:99"}).status_code == 200


def test_listed_origins(tokenizer: Tokenizer) -> None:
    origin = "https://chat.example"
    state = replace(scripted_state(tokenizer), allowed_origins=frozenset({origin}))
    engine_of(state).say("ok")
    with serve(state) as base:
        response = post(base, HELLO, headers={"origin": origin})
        assert response.headers["access-control-allow-origin"] == origin
