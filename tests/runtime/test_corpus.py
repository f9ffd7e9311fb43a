"""Every bad checkpoint is refused with one line, by the loader and by the command; odd ones load.

The cases are in `tests.runtime.corpus`, and ``python -m tests.runtime.corpus`` prints them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.errors import BadRequest, CheckpointError
from tests.runtime.checkpoints import dequantized
from tests.runtime.corpus import BAD, ODDITIES
from tests.runtime.corpus.case import SERVED, Loaded, limited_memory, load
from tests.runtime.corpus.command import OPTIONS, ROOT, CommandServer, Result
from tests.runtime.corpus.oddities import CODE, MARKER

FATHOM = [sys.executable, "-P", "-m", "api"]
MAX_SECONDS = 10
MAX_GROWTH = 200 << 20
"""Bytes: a header of 8 MB, parsed, takes most of it."""
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Highest resident bytes of this process since the last reset."""
    [line] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) << 10


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails a test that takes long or much memory."""
    measures = os.access(CLEAR_REFS, os.W_OK)  # Linux only
    if measures:
        CLEAR_REFS.write_text("5")  # resets the peak to the present size
    before, started = peak_memory() if measures else 0, time.monotonic()
    with limited_memory():
        yield
    assert time.monotonic() - started < MAX_SECONDS
    assert not measures or peak_memory() - before < MAX_GROWTH


@pytest.fixture(scope="module")
def command() -> Iterator[CommandServer]:
    server = CommandServer()
    yield server
    server.close()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("bounded")
def test_the_loader_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    case = BAD[name]
    folder = case.write(tmp_path)
    with case.reading(folder) as path, pytest.raises(CheckpointError) as caught:
        load(path, case.dtype)
    assert case.faults_of(str(caught.value), folder) == []


@pytest.mark.parametrize("name", BAD)
def test_the_command_ends_with_that_line(name: str, tmp_path: Path, command: CommandServer) -> None:
    folder = BAD[name].write(tmp_path)
    require_one_line(name, folder, command.serve(name, folder))


def require_one_line(name: str, folder: Path, result: Result) -> None:
    assert result.returncode == 2, result
    assert result.stderr.endswith("\n")
    line = result.stderr[:-1].removeprefix("fathom: ")
    assert BAD[name].faults_of(line, folder) == []
    assert "serving" not in result.stdout
    assert result.peak_bytes < MAX_GROWTH


@pytest.mark.parametrize("name", ["file: half the file", "tensor: NaN in BF16"])
def test_processes_of_its_own_make_no_difference(name: str, tmp_path: Path) -> None:
    """The command as it is installed: in the header, and in the engine process."""
    folder = BAD[name].write(tmp_path)
    done = subprocess.run(
        [*FATHOM, "serve", folder, *OPTIONS.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    require_one_line(name, folder, Result(done.returncode, done.stdout, done.stderr, 0))


# -- valid oddities ------------------------------------------------------------------------------


def has_no_template(loaded: Loaded) -> bool:
    with pytest.raises(BadRequest, match="no chat template"):
        loaded.tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    return True


def fails_a_request(loaded: Loaded) -> bool:
    with pytest.raises(BadRequest):
        loaded.tokenizer.encode_chat([{"role": "user", "content": "x" * 40}])
    return True


FACTS: dict[str, Callable[[Loaded], bool]] = {
    "no eos": lambda it: not it.tokenizer.eos_token_ids and not it.checkpoint.eos_token_ids,
    "no chat template": has_no_template,
    "chat template that builds a gigabyte": fails_a_request,
    "tokenizer with a regular expression that never ends": fails_a_request,
    "no torch_dtype": lambda it: it.checkpoint.dtype == torch.float32,
    "the new spelling of dtype": lambda it: it.checkpoint.dtype == torch.float16,
    "context of four million": lambda it: it.checkpoint.config.max_position_embeddings == 1 << 22,
    "more embeddings than tokens": lambda it: it.checkpoint.config.vocab_size == 2112,
    "config that says a key twice": lambda it: it.checkpoint.config.vocab_size == 2048,
    "MTP declared": lambda it: "model.layers.3.eh_proj.weight" in it.tensors,
    "a matrix of zeros": lambda it: any(not tensor.any() for tensor in it.tensors.values()),
}
SKIPPED = {
    "rotary buffers of old releases": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "tied head stored all the same": "lm_head.weight",
    "MTP there, not declared": r"model\.layers\.3\..*",
}
"""The stored tensors that the model does not have, as a regular expression."""


@pytest.mark.parametrize("name", ODDITIES)
@pytest.mark.usefixtures("bounded")
def test_an_oddity_loads_and_every_value_arrives(name: str, tmp_path: Path) -> None:
    case = ODDITIES[name]
    folder = case.write(tmp_path)
    loaded = load(folder)
    stored = {
        key: tensor
        for path in folder.glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }
    _, plain = dequantized(case.config or SERVED, stored)
    for key, tensor in loaded.tensors.items():
        kept = tensor.dtype == torch.float8_e4m3fn
        expected = stored[key] if kept or key not in plain else plain[key]
        assert torch.equal(tensor.float(), expected.float()), key
    skipped = {key for key in stored if not key.endswith("_scale_inv")} - loaded.tensors.keys()
    assert all(re.fullmatch(SKIPPED.get(name, ""), key) for key in skipped)
    assert bool(skipped) == (name in SKIPPED)
    assert FACTS.get(name, lambda loaded: True)(loaded)


def test_facts_are_of_oddities() -> None:
    assert (FACTS.keys() | SKIPPED.keys()) <= ODDITIES.keys()


# -- nothing is executed -------------------------------------------------------------------------

AUDIT = """
import os, sys
folder, log = {folder!r}, {log!r}
readable = (".safetensors", ".json", ".jinja")

def is_inside(text):
    path = os.path.abspath(os.fsdecode(text))
    return len(path) < 4096 and path.startswith(folder + os.sep) and os.path.isfile(path)

def is_from_numba():
    # which keeps our own compiled loops in pickles beside their sources
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("numba/core/caching.py"):
        frame = frame.f_back
    return frame is not None

def audit(event, arguments):
    found = event == "os.system" or event == "pickle.find_class" and not is_from_numba()
    if event in ("open", "compile", "import", "exec", "ctypes.dlopen", "subprocess.Popen"):
        texts = [getattr(argument, "co_filename", argument) for argument in arguments]
        texts = [text for text in texts if isinstance(text, str | bytes) and is_inside(text)]
        found = any(event != "open" or not text.endswith(readable) for text in texts)
    if found:
        with open(log, "a") as file:
            print(event, arguments, file=file)

sys.addaudithook(audit)
open(log + ".hooked", "a").close()
"""


def test_nothing_in_a_folder_is_executed(tmp_path: Path) -> None:
    """Served from inside the folder, with an audit hook in both processes, up to a first answer."""
    folder, log = ODDITIES[CODE].write(tmp_path), tmp_path / "log"
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(AUDIT.format(folder=str(folder), log=str(log)))
    with subprocess.Popen(
        [*FATHOM, "serve", ".", *OPTIONS.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if found := re.search(r"http://\S+/v1", line):
                break
        else:
            pytest.fail(printed)
        body = {"model": folder.name, "messages": [{"role": "user", "content": "hi"}]}
        request = urllib.request.Request(
            f"{found[0]}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400
        assert "chat template" in caught.value.read().decode()
        caught.value.close()
        process.send_signal(signal.SIGTERM)
    assert not log.exists(), log.read_text()
    assert (tmp_path / "log.hooked").exists()
    assert not (tmp_path / MARKER).exists()
