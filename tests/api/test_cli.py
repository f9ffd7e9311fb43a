"""The `fathom` command as a user types it: mistakes are one line and exit code 2, keys work."""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from api.cli import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights" / "fathom-tiny"

Fathom = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def fathom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Fathom:
    """Runs the command in this process: importing torch for each would take minutes."""
    monkeypatch.setenv("FATHOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["fathom", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int | None)
        return Result(caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "--prot", "8001"], "No such option: --prot"),
        (["serve", "--port", "eighty"], "Invalid value for '--port'"),
        (["serve", "--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["serve", "--device", "tpu"], "--device 'tpu' is not one of auto, cpu, cuda"),
        (["serve", "--port", "0", "--device", "cuda:99"], "--device cuda:99: this machine shows"),
        (["serve", "--dtype", "int3"], "--dtype 'int3' is not one of"),
        (["serve", "--quantization", "q4"], "--quantization 'q4' is not one of auto, none, fp8"),
        (["serve", "--fp8-activations", "1"], "--fp8-activations '1' is not one of auto, on, off"),
        (["serve", "--port", "0", "--fp8-activations", "on"], "on needs FP8 weights"),
        (["serve", "--yarn-attn-factor", "1"], "--yarn-attn-factor '1' is not one of checkpoint"),
        (["serve", "--kv-cache-memory", "lots"], "--kv-cache-memory 'lots' is not a size"),
        (["serve", "--page-size", "12"], "--page-size must be a power of two up to 128, got 12"),
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs must be between 1 and 4096, got 0"),
        (["serve", "--port", "0", "./no-such-folder"], "./no-such-folder: no such folder"),
        (["serve", "--port", "0", "--max-model-len", "9000"], "9000 is above the 8192 tokens"),
        (["serve", "--port", "0", "--host", "no.such.host.invalid"], "is not an address"),
        (["chat", "./no-such-folder"], "./no-such-folder: no such folder"),
        (["pull", "not-a-hub-id"], "not-a-hub-id: not a hub id"),
        (["keys", "revoke", "nobody"], "nobody"),
        (["serve", ""], "the model's name is empty"),
        (["serve", "--served-model-name", ""], "--served-model-name '' is empty"),
        (["serve", "--served-model-name", "a\nb"], r"--served-model-name 'a\nb' is empty or not"),
        (["serve", "--kv-cache-memory", "9" * 400], "is not a size"),
        (["serve", "--threads", "100000000000"], "--threads must be between 1 and 1024"),
        (["sing"], "No such command 'sing'"),
        (["serve", "--drain", "-1"], "--drain must be between 0 and 86400 seconds, got -1"),
        (["serve", "--drain", "nan"], "--drain must be between 0 and 86400 seconds, got nan"),
        (["serve", "--watchdog", "0"], "--watchdog must be between 1 and 86400 seconds, got 0"),
        (["serve", "--limit", "queue=0"], "--limit queue must be from 1 to 100000, got '0'"),
        (["serve", "--limit", "shoes=1"], "--limit knows no 'shoes'"),
        (["serve", "--port", "0", "--tls-cert", "a.pem"], "--tls-cert and --tls-key belong"),
        (["serve", "--port", "0", "--tls-key", "a.pem"], "--tls-cert and --tls-key belong"),
        (["serve", "--tls-cert", "no.pem", "--tls-key", "no.pem"], "--tls-cert no.pem: No such"),
        (["serve", "--tls-cert", str(ROOT), "--tls-key", str(ROOT)], "Is a directory"),
        (["serve", "--tls-cert", __file__, "--tls-key", __file__], "are not a PEM certificate"),
        (["serve", "--allowed-origin", "http://x/chat"], "without a path"),
        (["serve", "--allowed-host", "http://x"], "leave out scheme and port"),
        (["serve", "--uds", __file__], "there is a file that is no socket"),
        (["serve", "--uds", "/no/such/folder/socket"], "cannot listen on /no/such/folder/socket"),
        (["serve", "--uds", "/tmp/" + "x" * 200], "AF_UNIX path too long"),
        (["serve", "--no-key", "--host", "0.0.0.0", "--port", "0"], "--no-key is for this machine"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(
    arguments: list[str], expected: str, fathom: Fathom
) -> None:
    result = fathom(*arguments)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_found_before_the_model_is_loaded(fathom: Fathom, busy_port: int) -> None:
    result = fathom("serve", "--port", str(busy_port))
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{busy_port}" in result.stderr
    assert "--port" in result.stderr
    assert "loaded" not in result.stdout


def test_an_open_address_without_keys_is_refused_with_the_command_that_helps(
    fathom: Fathom,
) -> None:
    result = fathom("serve", "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 2
    assert "fathom keys create" in result.stderr


def test_a_unix_socket_in_use_is_refused_and_a_stale_one_replaced(
    fathom: Fathom, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        result = fathom("serve", "--uds", str(path), "./no-such-folder")
        assert result.returncode == 2
        assert "a server listens there already" in result.stderr
    assert path.is_socket(), "a socket of another server stays"
    result = fathom("serve", "--uds", str(path), "./no-such-folder")
    assert "./no-such-folder: no such folder" in result.stderr
    assert not path.exists(), "a server that does not start leaves no socket"


@pytest.mark.parametrize(
    ("file_name", "damage", "expected"),
    [
        ("config.json", b"{", "config.json"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("model.safetensors", b"\x00" * 100, "model.safetensors"),
    ],
)
def test_a_broken_file_is_named(
    file_name: str, damage: bytes, expected: str, fathom: Fathom, tmp_path: Path
) -> None:
    folder = tmp_path / "broken model"
    shutil.copytree(TINY, folder)
    (folder / file_name).write_bytes(damage)
    result = fathom("serve", str(folder), "--port", "0")
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_weight_that_is_not_finite_ends_the_start_with_its_name(
    fathom: Fathom, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header_size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + header_size])["model.norm.weight"]
    position = 8 + header_size + entry["data_offsets"][0]
    data[position : position + 2] = b"\xc0\x7f"  # bfloat16 NaN
    file.write_bytes(data)
    result = fathom("serve", str(folder), "--port", "0")
    assert result.returncode == 2
    assert "model.norm.weight" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_keys_are_shown_once_listed_without_the_secret_and_revoked(
    fathom: Fathom, tmp_path: Path
) -> None:
    created = fathom("keys", "create", "open-webui")
    secret = created.stdout.strip()
    assert created.returncode == 0
    assert secret.startswith("sk-open-webui-")
    listed = fathom("keys", "list")
    assert "open-webui" in listed.stdout
    assert "active" in listed.stdout
    assert secret[-43:] not in listed.stdout
    assert fathom("keys", "revoke", "open-webui").returncode == 0
    assert "revoked" in fathom("keys", "list").stdout
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("keys.db*"))
    assert secret[-20:].encode() not in stored
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.rglob("keys.db*"))


def test_help_teaches_every_command(fathom: Fathom) -> None:
    overview = fathom("--help").stdout
    for command in ("serve", "chat", "inspect", "keys", "pull"):
        assert command in overview
        assert "Usage" in fathom(command, "--help").stdout
    assert "fathom serve deepseek-ai/" in fathom("serve", "--help").stdout


def test_chat_answers_in_the_terminal_and_leaves_at_end_of_input(fathom: Fathom) -> None:
    result = fathom("chat", "--temperature", "0", stdin="hello\n/clear\n/?\nhi\n")
    assert result.returncode == 0, result.stderr
    assert "hello there" in result.stdout.lower()


def test_a_key_that_could_not_be_shown_is_revoked(
    fathom: Fathom, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["fathom", "keys", "create", "lost"])
        patch.setattr(sys, "stdout", Full())
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 2
    assert "revoked" in fathom("keys", "list").stdout
