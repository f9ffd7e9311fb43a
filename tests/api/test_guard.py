"""Raw requests: paths, methods, bodies, browsers. Whatever is wrong, the envelope is the same."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from api.errors import HttpError
from api.guard import BodyMemory, Guard, HeldBody, canonical_path, check_nesting, read_body
from api.limits import Limits
from api.serve import ServeOptions
from runtime import BadRequest, ConfigError, Tokenizer
from tests.api.scripted import (
    ScriptedEngine,
    engine_of,
    post,
    scripted_state,
    serve,
    wait_until,
)

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
    assert canonical_path("http://localhost") == canonical_path("http://localhost/") == "/"
    assert canonical_path("HTTPS://[::1]:8000/v1/models") == "/models"
    assert canonical_path("/http://localhost/models") == "/http:/localhost/models"


def test_a_target_with_scheme_and_name_as_a_proxy_is_asked(base: str) -> None:
    """RFC 9112, 3.2.2. The name that must be ours is still the Host header's."""

    def status(target: str, host: str) -> int:
        connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=10)
        connection.request("GET", target, headers={"Host": host})
        with contextlib.closing(connection):
            return connection.getresponse().status

    for target in (
        "http://localhost/health",
        "http://localhost:80/v1/models?a=b",
        f"{base}/models",
    ):
        assert status(target, "localhost") == 200
        assert status(target, "evil.example") == 421
    assert status("http://localhost/v1/nothing", "localhost") == 404
    assert status("ftp://localhost/health", "localhost") == 404


def test_any_host_name_needs_a_key() -> None:
    """A page whose name is made to mean this machine would be let in by nothing else."""
    with pytest.raises(ConfigError, match=r"--allowed-host '\*' with --no-key .* name the hosts"):
        ServeOptions("127.0.0.1", 0, ("a",), needs_key=False, allowed_hosts=frozenset("*"))
    ServeOptions("127.0.0.1", 0, ("a",), needs_key=True, allowed_hosts=frozenset("*"))
    ServeOptions("127.0.0.1", 0, ("a",), needs_key=False, allowed_hosts=frozenset(("box",)))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/chat", "/v1/responses", "/%00", "/page"])
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
    padding = b"x" * (Limits().body - len(empty))
    fitting = empty.replace(b'""', b'"' + padding + b'"')
    assert len(fitting) == Limits().body == 8 << 20
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


NAMES = {
    "localhost": 200,
    "LOCALHOST:99": 200,
    "localhost.": 200,
    "127.0.0.1": 200,
    "127.0.0.1:8000": 200,
    "[::1]": 200,
    "[0:0::1]:80": 421,
    "host.docker.internal:8000": 200,
    "evil.example": 421,
    "127.0.0.1.evil.example": 421,
    "localhost.evil.example": 421,
    "evil.example:localhost": 421,
    "localhost@evil.example": 421,
    "localhost/?x=": 421,
    "127.0.0.2": 421,
    "127.1": 421,
    "2130706433": 421,
    "0.0.0.0": 421,
    "::1": 421,
    "[::1": 421,
    "": 421,
    "localhost:": 421,
    "localhost:123456": 421,
    "localhost, evil.example": 421,
    "*": 421,
    "ｌocalhost": 421,
}


@pytest.mark.parametrize("needs_key", [False, True])
@pytest.mark.parametrize("host", NAMES)
def test_a_server_answers_to_its_own_names_only(host: str, needs_key: bool) -> None:
    response = call(needs_key=needs_key, headers={"host": host})
    assert response.status_code == NAMES[host]
    if response.status_code == 421:
        error = error_of(response)
        assert error["code"] == "unknown_host"
        assert "--allowed-host NAME" in str(error["message"])


def test_names_over_a_real_server(base: str) -> None:
    for host, status in (("evil.example", 421), ("[::1", 421), ("localhost:99", 200)):
        assert httpx.get(f"{base}/models", headers={"host": host}).status_code == status


def test_allowed_hosts() -> None:
    names = frozenset({"GPU-box", "gpu.lan", "[fd00::1]"})
    for host in ("gpu-box", "gpu-box:8000", "GPU.lan.", "[fd00::1]:8000", "localhost"):
        assert call(allowed_hosts=names, headers={"host": host}).status_code == 200
    for host in ("gpu", "x.gpu.lan", "evil.example"):
        assert call(allowed_hosts=names, headers={"host": host}).status_code == 421
    for host in ("evil.example", "10.0.0.1"):
        assert call(allowed_hosts=frozenset("*"), headers={"host": host}).status_code == 200
    assert call(allowed_hosts=frozenset("*"), headers={"host": ""}).status_code == 421


@pytest.mark.parametrize(
    ("local", "host", "status"),
    [
        ("192.168.1.5", "192.168.1.5:8000", 200),
        ("192.168.1.5", "192.168.1.6", 421),
        ("::ffff:192.168.1.5", "192.168.1.5", 200),
        ("fd00::5", "[fd00:0:0::5]:80", 200),
        ("fe80::5%eth0", "[fe80::5]", 200),
        ("/run/fathom.sock", "localhost", 200),
        ("/run/fathom.sock", "/run/fathom.sock", 421),
    ],
)
def test_the_address_that_was_connected_to_is_a_name(local: str, host: str, status: int) -> None:
    assert call(server=(local, 8000), headers={"host": host}).status_code == status


def test_exactly_one_host() -> None:
    twice = [("host", "localhost"), ("host", "localhost")]
    assert call(headers=twice).status_code == 400


@pytest.mark.parametrize("needs_key", [False, True])
def test_origins_of_desktop_clients_need_a_key(needs_key: bool) -> None:
    for origin in ("null", "file://", "app://obsidian.md", "https://evil.example"):
        response = call(needs_key=needs_key, headers={"host": "localhost", "origin": origin})
        assert response.status_code == (200 if needs_key else 403)
        allowed = response.headers.get("access-control-allow-origin")
        assert allowed == (origin if needs_key else None)
        assert "access-control-allow-credentials" not in response.headers


def test_pages_of_the_server_itself() -> None:
    hosts = frozenset({"gpu-box"})
    for origin, status in (
        ("http://gpu-box:8000", 200),
        ("http://GPU-box:8000", 200),
        ("http://gpu-box:9000", 403),
        ("http://evil.example", 403),
        ("gpu-box:8000", 403),
    ):
        headers = {"host": "gpu-box:8000", "origin": origin}
        assert call(allowed_hosts=hosts, headers=headers).status_code == status


class Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


@pytest.mark.parametrize("error", [Panic("secret"), ValueError("secret"), MemoryError()])
def test_faults_of_any_kind_are_one_failed_request(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    response = call(error=error)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text + caplog.text
    assert type(error).__name__ in caplog.text


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(1), GeneratorExit()]
)
def test_what_ends_a_task_or_the_process_passes(error: BaseException) -> None:
    guard = guarded(error=error)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}

    async def ignore(message: Message) -> None:
        raise AssertionError(f"{message} was sent")

    coroutine = guard(scope, None, ignore)  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        coroutine.send(None)


def guarded(
    error: BaseException | None = None,
    *,
    needs_key: bool = False,
    allowed_hosts: frozenset[str] = frozenset(),
) -> Guard:
    """The guard around an application that answers anything, or raises ``error``."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if error is not None:
            raise error
        await PlainTextResponse("fine")(scope, receive, send)

    return Guard(application, needs_key=needs_key, allowed_hosts=allowed_hosts)


def call(
    error: BaseException | None = None,
    *,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    server: tuple[str, int] = ("127.0.0.1", 8000),
    needs_key: bool = False,
    allowed_hosts: frozenset[str] = frozenset(),
) -> httpx.Response:
    """The answer of `guarded` to a GET with exactly these headers."""
    guard = guarded(error, needs_key=needs_key, allowed_hosts=allowed_hosts)
    if headers is None:
        headers = {"host": "localhost"}
    pairs = headers if isinstance(headers, list) else list(headers.items())
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "server": server,
        "headers": [(name.encode(), value.encode()) for name, value in pairs],
    }
    asyncio.run(guard(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body)


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    """An object whose deepest value has ``depth`` arrays or objects around it."""
    inside = opening * (depth - 1) + "1" + closing * (depth - 1)
    return b'{"messages": ' + inside.encode() + b"}"


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('["]",', "]")])
def test_json_depth_at_the_limit_and_one_beyond(base: str, opening: str, closing: str) -> None:
    at_limit = post(base, nested(64, opening, closing))
    assert error_of(at_limit)["code"] != "invalid_json"
    beyond = post(base, nested(65, opening, closing))
    assert beyond.status_code == 400
    assert error_of(beyond)["code"] == "invalid_json"
    assert "nested more than 64 deep" in str(error_of(beyond)["message"])


def test_brackets_in_text_are_not_nested(base: str, engine: ScriptedEngine) -> None:
    engine.say("ok")
    for text in ("[" * 500, '"[' * 100 + "\\", '\\\\" [{' * 50, "\\"):
        body = {"messages": [{"role": "user", "content": text}]}
        assert post(base, body).status_code == 200


def test_json_containers_at_the_limit_and_one_beyond() -> None:
    limits = Limits()
    fitting = b"[" + b'{"[": "["},' * (limits.json_containers - 1) + b"1]"
    check_nesting(fitting, limits)
    with pytest.raises(BadRequest, match="more than 50000 arrays and objects"):
        check_nesting(fitting.replace(b"1]", b"[]]"), limits)


def test_json_values_at_the_limit_and_one_beyond(base: str, engine: ScriptedEngine) -> None:
    limits = Limits()
    fitting = b'{",,\\",": ",", "a": [' + b'"",' * (limits.json_values - 1) + b"1]}"
    check_nesting(fitting, limits)
    engine.say("ok")
    beyond = post(base, fitting.replace(b"1]", b"1,1]"))
    assert beyond.status_code == 400
    assert error_of(beyond)["code"] == "invalid_json"
    assert "more than 200000 values" in str(error_of(beyond)["message"])
    text = "," * (limits.json_values + 1)
    response = post(base, {"messages": [{"role": "user", "content": text}]})
    assert error_of(response)["code"] == "context_length_exceeded"


@settings(max_examples=40, deadline=None)
@given(st.deferred(lambda: values))
def test_values_are_counted_as_by_hand(value: object) -> None:
    text = json.dumps(value)
    num_commas = re.sub(r'"(\\.|[^"\\])*"', "", text).count(",")
    limits = Limits(json_depth=500)
    check_nesting(text.encode(), replace(limits, json_values=num_commas))
    if num_commas:
        with pytest.raises(BadRequest, match=f"more than {num_commas - 1} values"):
            check_nesting(text.encode(), replace(limits, json_values=num_commas - 1))


def depth_by_hand(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for letter in text:
        if in_string:
            in_string = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            in_string = True
        elif letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]}":
            depth -= 1
    return deepest


values = st.recursive(
    st.text(alphabet='\\"[]{}a\n,'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='\\"[{a'), inner),
)


@settings(max_examples=40, deadline=None)
@given(values)
def test_nesting_is_counted_as_by_hand(value: object) -> None:
    text = json.dumps(value)
    depth = depth_by_hand(text)
    check_nesting(text.encode(), Limits(json_depth=depth))
    if depth:
        with pytest.raises(BadRequest, match=f"nested more than {depth - 1} deep"):
            check_nesting(text.encode(), Limits(json_depth=depth - 1))


def test_listed_origins(tokenizer: Tokenizer) -> None:
    origin = "https://chat.example"
    state = replace(scripted_state(tokenizer), allowed_origins=frozenset({origin}))
    engine_of(state).say("ok")
    with serve(state) as base:
        response = post(base, HELLO, headers={"origin": origin})
        assert response.headers["access-control-allow-origin"] == origin


# -- bodies that take memory and time ------------------------------------------------------------

ROOM = 1 << 20  # for bodies, in a server of `crowded`


@pytest.fixture
def crowded(tokenizer: Tokenizer) -> Iterator[str]:
    """A server with little room for bodies, whose answers take long."""
    limits = Limits(body=ROOM, bodies=ROOM, request_seconds=5)
    state = replace(scripted_state(tokenizer), limits=limits)
    engine_of(state).say("ok")
    with serve(state) as address:
        yield address


def begin_body(base: str, num_bytes: int, declared: int) -> socket.socket:
    """A connection on which the first bytes of a body were sent."""
    address = urlsplit(base)
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {declared}\r\n\r\n"
    )
    connection.sendall(head.encode() + b" " * num_bytes)
    return connection


def large(num_bytes: int = ROOM * 3 // 4) -> bytes:
    return json.dumps({**HELLO, "padding": "x" * (num_bytes - 100)}).encode()


def test_bodies_have_one_memory_and_small_ones_do_not_count(crowded: str) -> None:
    assert post(crowded, large()).status_code == 200
    refused = None
    for _ in range(50):  # the bytes may come later than the other body, which then is refused
        with begin_body(crowded, ROOM - 10, ROOM - 1):
            time.sleep(0.1)
            response = post(crowded, large())
            if response.status_code == 503:
                refused = response
                assert post(crowded, HELLO).status_code == 200
                break
    assert refused is not None
    assert error_of(refused)["code"] == "server_overloaded"
    assert int(refused.headers["retry-after"]) > 0
    wait_until(lambda: post(crowded, large()).status_code == 200)


def test_a_body_that_is_too_long_holds_nothing(crowded: str) -> None:
    with begin_body(crowded, ROOM // 2, 3 * ROOM) as other:
        other.sendall(b" " * ROOM)
        for _ in range(5):
            assert post(crowded, large()).status_code == 200


def test_an_answer_holds_no_body(tokenizer: Tokenizer) -> None:
    state = replace(scripted_state(tokenizer), limits=Limits(body=ROOM, bodies=ROOM))
    engine_of(state).say("ok")
    engine_of(state).first_token_seconds = 60
    with serve(state) as base, contextlib.ExitStack() as connections:
        for count in (1, 2, 3):
            connection = connections.enter_context(begin_body(base, 0, len(large())))
            connection.sendall(large())
            wait_until(lambda count=count: engine_of(state).num_live == count)


def test_a_body_that_drips_is_ended(tokenizer: Tokenizer) -> None:
    limits = Limits(request_seconds=1, body_rate=1)
    state = replace(scripted_state(tokenizer), limits=limits)
    with serve(state) as base, begin_body(base, 10, 1000) as connection:
        connection.settimeout(0.1)
        received = b""
        deadline = time.monotonic() + 10
        while b"request_timeout" not in received:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                received += connection.recv(4096)
            with contextlib.suppress(OSError):
                connection.sendall(b" ")
    assert received.startswith(b"HTTP/1.1 408")
    assert b"did not end in 1 s" in received


def test_the_bytes_of_a_refused_body_are_dropped() -> None:
    part = 64 << 10
    held: list[int] = []

    async def receive() -> Message:
        held.append(tracemalloc.get_traced_memory()[0])
        return {"type": "http.request", "body": bytes(part), "more_body": len(held) < 30}

    async def read() -> None:
        memory = BodyMemory(ROOM)
        with pytest.raises(HttpError, match=f"above {ROOM} bytes"):
            await read_body(Headers(), receive, ROOM, HeldBody(memory))
        assert memory.num_bytes == 0

    tracemalloc.start()
    try:
        asyncio.run(read())
    finally:
        tracemalloc.stop()
    assert held[16] - held[0] >= ROOM
    assert held[-1] - held[0] < ROOM / 4
