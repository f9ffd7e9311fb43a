"""``--limit NAME=VALUE``: what it takes, and one clear line for what it does not."""

from __future__ import annotations

import pytest

from api.limits import Limits
from runtime import ConfigError


def test_the_defaults_are_the_documented_ones() -> None:
    rows = {name: default for name, default, _ in Limits.describe()}
    assert rows == {
        "body": "8MiB",
        "bodies": "256MiB",
        "body-seconds": "30s",
        "body-rate": "1KiB",
        "request-line": "4KiB",
        "header": "16KiB",
        "headers": "100",
        "header-seconds": "10s",
        "json-depth": "64",
        "json-containers": "50000",
        "json-values": "200000",
        "connections": "1024",
        "connections-per-address": "256",
        "keep-alive": "75s",
        "ping": "10s",
        "stall": "30s",
        "queue": "256",
        "queue-seconds": "2min",
        "request-seconds": "30min",
        "failed-keys": "20",
    }
    assert all(meaning for _, _, meaning in Limits.describe())


@pytest.mark.parametrize("row", Limits.describe(), ids=lambda row: row[0])
def test_a_default_can_be_given_as_it_is_shown(row: tuple[str, str, str]) -> None:
    name, default, _ = row
    field = name.replace("-", "_")
    assert getattr(Limits.parse([f"{name}={default}"]), field) == getattr(Limits(), field)


def test_units() -> None:
    limits = Limits.parse(
        ["body=16MiB", "header=20000", "connections=2048", "keep-alive=1.5min", "stall=0.1h"]
    )
    assert limits.body == 16 << 20
    assert limits.header == 20_000
    assert limits.connections == 2048
    assert limits.keep_alive == 90
    assert limits.stall == 360
    assert Limits.parse([]) == Limits()


def test_loopback_counts_once_the_limit_of_an_address_is_given() -> None:
    assert not Limits.parse(["connections=9"]).counts_loopback
    assert Limits.parse(["connections-per-address=9"]).counts_loopback


@pytest.mark.parametrize(
    ("name", "low", "high", "below", "above"),
    [
        ("body", "1KiB", "1GiB", "1023", "1073741825"),
        ("json-depth", "8", "500", "7", "501"),
        ("keep-alive", "1s", "1h", "0.99", "3601"),
    ],
)
def test_ranges(name: str, low: str, high: str, below: str, above: str) -> None:
    for good in (low, high):
        Limits.parse([f"{name}={good}"])
    for bad in (below, above):
        with pytest.raises(ConfigError) as caught:
            Limits.parse([f"{name}={bad}"])
        assert str(caught.value) == f"--limit {name} must be from {low} to {high}, got '{bad}'"


@pytest.mark.parametrize(
    "setting",
    [
        "body",
        "=1",
        "",
        "nobody=1",
        "counts-loopback=1",
        "body=",
        "body=16XB",
        "body=-1MiB",
        "body=1e6",
        "body=nan",
        "body=10s",
        "body=٣KiB",
        "connections=1.5",
        "connections=1KiB",
        "keep-alive=inf",
        "keep-alive=" + "9" * 5000,
    ],
)
def test_what_is_no_setting(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Limits.parse([setting])
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("--limit ")


def test_twice_and_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"^--limit body is given twice$"):
        Limits.parse(["body=1MiB", "body=2MiB"])
    with pytest.raises(ConfigError, match=r"no 'nobody'; it knows body, bodies, body-seconds, "):
        Limits.parse(["nobody=1"])
