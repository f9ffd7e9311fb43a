"""The page as a browser gets it: every file, its headers, and nothing from elsewhere."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from api.app import ServerState, create_app
from api.keys import KeyStore
from runtime import Tokenizer
from tests.api.scripted import scripted_state

FOLDER = Path(__file__).resolve().parents[2] / "api" / "page"
NAMES = sorted(path.name for path in FOLDER.iterdir())
PATHS = ["/", *[f"/page/{name}" for name in NAMES if name != "index.html"]]
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
VOID = {"meta", "link", "input"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def state(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerState]:
    """Of a server that needs keys."""
    keys = KeyStore.open(tmp_path_factory.mktemp("home") / "keys.sqlite")
    keys.create("ann")
    yield replace(scripted_state(tokenizer), keys=keys)
    keys.close()


def ask(state: ServerState, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize("path", PATHS)
def test_every_file_is_there_without_a_key_under_a_strict_policy(
    state: ServerState, path: str
) -> None:
    answer = ask(state, path)
    assert answer.status_code == 200
    name = "index.html" if path == "/" else path.rpartition("/")[2]
    assert answer.content == (FOLDER / name).read_bytes()
    headers = answer.headers
    assert headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"
    again = ask(state, path, **{"If-None-Match": f'"x", {headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == headers["etag"]
    assert ask(state, path, **{"If-None-Match": '"other"'}).status_code == 200
    head = ask(state, path, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize(
    "path",
    ["/page/index.html", "/page/", "/page/..%2fpage.py", "/page/../app.py", "/page/%2e%2e/keys.py"],
)
def test_nothing_else_is_given_out(state: ServerState, path: str) -> None:
    assert ask(state, path).status_code == 401
    assert ask(replace(state, keys=None), path).status_code == 404


def test_only_reading_is_open(state: ServerState) -> None:
    assert ask(state, "/", "POST").status_code == 401
    assert ask(state, "/v1/models").status_code == 401
    assert ask(state, "/", Host="evil.example").status_code == 421


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_server_or_makes_markup_of_text(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\s\"'`)]+", text)) <= {SVG_NAMESPACE}
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?//", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
    assert not re.search(r"DOMParser|srcdoc|new Function|setAttribute\(\"(?:style|on)", text)
    if name.endswith(".js"):
        imported = re.findall(r"""(?:from|import)\s*\(?["']([^"']+)["']""", text)
        assert {f"./{path.name}" for path in FOLDER.glob("*.js")} >= set(imported)


class Document(HTMLParser):
    """Which elements are open, and every attribute that was met."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def values(self, wanted: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == wanted]


def parsed() -> Document:
    document = Document()
    document.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    document.close()
    return document


def test_the_document_is_well_formed_and_its_references_lead_somewhere() -> None:
    document = parsed()
    assert document.open == []
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
        assert set(document.values(name)) <= set(ids)
    names = {name for _, name, _ in document.attributes}
    assert {name for name in names if name == "style" or name.startswith("on")} == set()
    loaded = document.values("src") + document.values("href")
    assert {f"/{path}" for path in loaded} <= set(PATHS)


def test_every_text_is_there_in_both_languages() -> None:
    source = (FOLDER / "words.js").read_text(encoding="utf-8")
    english, chinese = (
        dict(re.findall(r'^  (\w+): "(.*)",$', part, re.MULTILINE))
        for part in re.findall(r"^const [A-Z]+ = \{$(.*?)^\};$", source, re.MULTILINE | re.DOTALL)
    )
    assert list(english) == list(chinese)
    assert len(english) > 80
    for name, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[name])), name
    document = parsed()
    said = {word for kind in ("say", "label", "hint") for word in document.values(f"data-{kind}")}
    for path in FOLDER.glob("*.js"):
        said |= set(re.findall(r'\bsay\("(\w+)"', path.read_text(encoding="utf-8")))
    assert said <= set(english)
