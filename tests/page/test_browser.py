"""The page in headless Chromium. ``pytest -m browser tests/page`` runs these; see `browser.py`.

Some scenarios run against `fathom serve` with the embedded model, those that must know the answer
against the scripted engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.app import ServerState
from runtime import Tokenizer
from tests.api.scripted import engine_of, scripted_state, serve, wait_until
from tests.clients.environments import InstallError, find_chromium, find_program
from tests.load.served import Served, served
from tests.page.browser import PLAYWRIGHT, run_scenario
from tests.page.pictures import take_pictures

pytestmark = pytest.mark.browser

ATTACK = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
MARKUP = f"{ATTACK}\n\n**<b>bold</b>** [link](javascript:window.hit=1)\n\n```html\n{ATTACK}\n```"


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Fails in one line, before a server is started, if there is nothing to drive."""
    try:
        find_chromium()
        PLAYWRIGHT.make()
    except InstallError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="module")
def real() -> Iterator[Served]:
    with served() as server:
        yield server


@pytest.fixture
def state(tokenizer: Tokenizer) -> ServerState:
    state = scripted_state(tokenizer)
    engine_of(state).say("Hello", thought="They greet me.")
    return state


@pytest.fixture
def base(state: ServerState) -> Iterator[str]:
    with serve(state) as address:
        yield address.removesuffix("v1")


def page_of(server: Served) -> str:
    return f"http://{server.address.host}:{server.address.port}/"


@pytest.mark.parametrize("name", ["talk", "settings"])
def test_with_the_embedded_model(real: Served, name: str) -> None:
    run_scenario(name, page_of(real), {}, key=real.address.key or "")


def test_the_server_goes_and_comes_back(tmp_path: Path) -> None:
    servers = [Served(tmp_path)]
    try:
        address = servers[0].wait_for_banner()

        def start() -> None:
            servers.append(Served(tmp_path, port=address.port))
            servers[-1].wait_for_banner()

        stop = servers[0].stop
        key = address.key or ""
        run_scenario("goneAndBack", page_of(servers[0]), {"stop": stop, "start": start}, key=key)
    finally:
        for server in servers:
            server.close()


def test_a_stream_is_stopped_and_the_engine_freed(state: ServerState, base: str) -> None:
    engine = engine_of(state)
    engine.say(" ".join(str(number) for number in range(1, 200)), thought="Let me count. " * 8)
    engine.seconds_per_token = 0.02

    def idle() -> bool:
        wait_until(lambda: engine.num_live == 0)
        return True

    run_scenario("stop", base, {"live": lambda: engine.num_live, "idle": idle})


def test_no_text_becomes_markup(state: ServerState, base: str) -> None:
    engine_of(state).say(MARKUP, thought=ATTACK)
    run_scenario("markup", base, {})


def test_an_error_in_a_stream_is_shown(state: ServerState, base: str) -> None:
    engine_of(state).say("as far as this", stop=False)
    engine_of(state).dies = True
    run_scenario("brokenStream", base, {})


def test_both_languages_and_themes(state: ServerState, base: str) -> None:
    engine_of(state).seconds_per_token = 0.05
    run_scenario("looks", base, {}, locale="zh-CN", theme="dark")


def test_a_narrow_screen(state: ServerState, base: str) -> None:
    engine_of(state).say(
        f"{'wide' * 40}\n\n```\n{'code ' * 40}\n```\n\n|a|b|\n|-|-|\n|{'c ' * 60}|d|"
    )
    run_scenario("narrow", base, {}, width="360", height="640")


@pytest.mark.parametrize("name", ["parts", "engine"])
def test_without_an_answer(base: str, name: str) -> None:
    run_scenario(name, base, {})


def test_the_pictures_are_taken_and_small(tmp_path: Path) -> None:
    take_pictures(tmp_path)
    taken = sorted(tmp_path.glob("*.png"))
    assert len(taken) >= 6
    for path in taken:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size < 150_000, path.name


def test_a_missing_browser_is_one_clear_line() -> None:
    with pytest.raises(InstallError, match=r"^no-such-browser is not installed.*apt-get install"):
        find_program("no-such-browser")
