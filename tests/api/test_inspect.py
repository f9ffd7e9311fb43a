"""`fathom inspect` as a user types it: what it prints, what it refuses, what it downloads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from api.cli import main
from tests.runtime.checkpoints import DEEPSEEK_V3_FP8, DEEPSEEK_V32, LLAMA, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "weights" / "fathom-tiny"
RELEASED = json.loads((ROOT / "benchmarks" / "released_configs.json").read_text())
GIB = 1 << 30


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.returncode == 0, self.stderr
        return dict(json.loads(self.stdout))

    def is_refused(self, *words: str) -> bool:
        """One line on stderr that has these words, exit code 2, nothing on stdout."""
        assert self.returncode == 2, self.stderr
        assert self.stdout == ""
        assert len(self.stderr.strip().splitlines()) == 1, self.stderr
        assert all(word in self.stderr for word in words), self.stderr
        return True


Inspect = Callable[..., Result]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Runs the command in this process, on a machine without a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["fathom", "inspect", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int | None)
        return Result(caught.value.code or 0, *capsys.readouterr())

    return run


def write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# -- folders -------------------------------------------------------------------------------------


def test_the_embedded_model_is_described(inspect: Inspect) -> None:
    text = inspect(str(TINY)).stdout
    assert "DeepseekV3ForCausalLM, 4 layers, context 8,192 tokens" in text
    assert re.search(r"^parameters +1\.6 M, 0\.9 M active per token\n +and 0\.8 M MTP$", text, re.M)
    assert re.search(r"^files +4\.7 MiB in 1 file, BF16, F32$", text, re.M)
    assert re.search(r"^weights +bf16 +4\.7 MiB +as released\n +fp8 +3\.5 MiB ", text, re.M)
    assert re.search(r"^cache +768 bytes per token", text, re.M)


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_config_prints_plain_lines_of_80_columns(
    name: str, inspect: Inspect, tmp_path: Path
) -> None:
    result = inspect(write_config(tmp_path / "m", RELEASED[name]["config"]))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[1:]  # the first is the folder's name
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() and line.isprintable() for line in lines)
    assert re.search(r"^parameters +[\d,.]+ B", result.stdout, re.M)
    can_run = RELEASED[name]["config"]["architectures"][0][:10] != "DeepseekV4"
    assert can_run != ("cannot run it yet" in result.stdout)
    assert can_run == ("\n24 GB" in result.stdout)


def test_a_config_alone_is_enough_and_the_report_says_so(inspect: Inspect, tmp_path: Path) -> None:
    config = RELEASED["v2_lite"]["config"]
    result = inspect(write_config(tmp_path / "m", config))
    assert "15.71 B, 2.45 B active per token" in result.stdout
    assert re.search(r"^files +not seen; everything here follows from config", result.stdout, re.M)
    assert re.search(r"^weights +bf16 +29\.3 GiB +as released$", result.stdout, re.M)
    assert re.search(r"^ +fp8 +15\.1 GiB +with --quantization fp8$", result.stdout, re.M)
    assert re.search(r"^24 GB +22\.8 GiB +does not fit +\d{3},\d{3}$", result.stdout, re.M)


def test_an_fp8_release_names_its_own_precision_first(inspect: Inspect, tmp_path: Path) -> None:
    text = inspect(write_config(tmp_path / "m", RELEASED["v3"]["config"])).stdout
    assert re.search(r"^weights +fp8 +642\.5 GiB +as released$", text, re.M)
    assert re.search(r"^ +bf16 +1\.2 TiB +with --quantization none$", text, re.M)
    assert re.search(r"^GPU +free +fp8 +bf16$", text, re.M)


def test_config_and_index_tell_sizes_and_which_draft_layers_are_there(
    inspect: Inspect, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m", DEEPSEEK_V32, num_shards=2)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["metadata"]["total_size"] = 123 * GIB
    index_path.write_text(json.dumps(index))
    report = inspect(str(folder), "--json").json
    assert report["stored"] == {"num_bytes": 123 * GIB, "num_files": 2, "dtypes": []}
    assert report["extra_parameters"]["MTP"] > 0
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if ".layers.3." not in name
    }
    index_path.write_text(json.dumps(index))
    assert inspect(str(folder), "--json").json["extra_parameters"] == {}


def test_memory_may_be_asked_about_several_times(inspect: Inspect, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", RELEASED["r1_distill_llama_8b"]["config"])
    result = inspect(folder, "--memory", "12GiB", "--memory", "40 GB")
    rows = result.stdout.splitlines()[-2:]
    assert re.fullmatch(r"12GiB +11\.4 GiB +does not fit +\d\d,\d{3}", rows[0])
    assert re.fullmatch(r"40 GB +35\.4 GiB +1\d\d,\d{3} +2\d\d,\d{3}", rows[1])


def test_json_has_the_same_numbers_in_bytes(inspect: Inspect, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", RELEASED["r1_distill_llama_8b"]["config"])
    report = inspect(folder, "--json", "--memory", "12GiB").json
    assert report["num_parameters"] == 8_030_261_248
    assert report["num_active_parameters"] is None
    assert report["weight_bytes"]["bf16"] == 2 * 8_030_261_248
    assert sum(report["cache_bytes_per_token"].values()) == 131_072
    (gpu,) = report["gpus"]
    assert gpu["memory"] == 12 * GIB
    assert gpu["context_left"]["bf16"] is None
    left = gpu["context_left"]["fp8"]
    room = int(0.95 * 12 * GIB) - GIB - report["weight_bytes"]["fp8"]
    assert 0 <= room - (left + 16) * 131_072 < 16 * 131_072  # the dummy page, and no page more


def test_a_gpu_that_is_there_is_answered_for(
    inspect: Inspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    properties = type("Properties", (), {"name": "NVIDIA RTX 4090", "total_memory": 24 * GIB})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    folder = write_config(tmp_path / "m", RELEASED["r1_distill_qwen_7b"]["config"])
    text = inspect(folder).stdout
    assert re.search(r"^NVIDIA RTX 4090 +20\.0 GiB +\d\d,\d{3} +\d{3},\d{3}$", text, re.M)
    assert "141 GB" not in text


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing argument 'model'"]),
        (["./no-such-folder"], ["./no-such-folder: no such folder"]),
        ([str(TINY), "--memory", "lots"], ["--memory 'lots' is not a size"]),
        ([str(TINY / "config.json")], ["is a file; give the folder"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str], inspect: Inspect) -> None:
    assert inspect(*arguments).is_refused(*words)


def test_a_full_disk_behind_standard_output_is_one_line(
    inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ([str(TINY)], [str(TINY), "--json"]):
        with Path("/dev/full").open("w", buffering=1) as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert inspect(*arguments).is_refused("No space left on device", "standard output")
            with contextlib.suppress(OSError):
                full.close()


def test_a_folder_without_config_is_one_line(inspect: Inspect, tmp_path: Path) -> None:
    assert inspect(str(tmp_path)).is_refused("config.json: No such file")


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_header_is_named(damage: str, inspect: Inspect, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", LLAMA)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"\xff" * 1000)
    assert inspect(str(folder)).is_refused(f"{path}: ")


def test_an_unknown_architecture_is_refused_with_the_known_ones(
    inspect: Inspect, tmp_path: Path
) -> None:
    folder = write_config(tmp_path / "m", LLAMA | {"architectures": ["MambaForCausalLM"]})
    assert inspect(folder).is_refused(
        '"MambaForCausalLM" is not one of', "LlamaForCausalLM", "DeepseekV41ForCausalLM"
    )


def test_a_config_that_lies_about_its_size_is_refused(inspect: Inspect, tmp_path: Path) -> None:
    config = RELEASED["v3"]["config"] | {"num_hidden_layers": 1024, "n_routed_experts": 8192}
    folder = write_config(tmp_path / "m", config)
    assert inspect(folder).is_refused("config.json: describes", "at most 10,000 B")


# -- the hub -------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A hub on this machine: serves one folder as org/model, and writes down what was asked."""

    folder: Path
    endpoint: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    num_bytes: dict[str, int] = field(default_factory=dict)  # sent, by file

    def answer(
        self, method: str, path: str, asked: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        self.requests.append((method, path, asked))
        owner, _, file_name = path.lstrip("/").partition("/")
        file_name = file_name.rpartition("/")[2]
        if owner == "gated":
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"}, b""
        if owner != "org":
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = {"X-Repo-Commit": "0" * 40}
        file = self.folder / file_name
        if not file.exists():
            return 404, commit | {"X-Error-Code": "EntryNotFound"}, b""
        data, status = file.read_bytes(), 200
        etag = hashlib.sha256(data).hexdigest()
        if asked is not None:
            first, last = asked.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        if method == "GET":
            self.num_bytes[file_name] = self.num_bytes.get(file_name, 0) + len(data)
        return status, commit | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, data


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_checkpoint(tmp_path / "repository", DEEPSEEK_V3_FP8, num_shards=2)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["metadata"]["total_size"] = 1_234_567
    index_path.write_text(json.dumps(index))
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, data = hub.answer(self.command, self.path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def inspect_online(tmp_path: Path) -> Callable[..., Result]:
    """Runs the command in a process of its own, with a cache of its own and this hub."""

    def run(hub_id: str, endpoint: str, *options: str, offline: bool = False) -> Result:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "NO_PROXY": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            [sys.executable, "-m", "api", "inspect", hub_id, *options],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


def test_a_hub_id_is_described_without_its_weights(
    hub: Hub, inspect_online: Callable[..., Result], inspect: Inspect
) -> None:
    result = inspect_online("org/model", hub.endpoint, "--json")
    assert result.stderr == ""
    report, local = result.json, inspect(str(hub.folder), "--json").json
    assert report["stored"]["num_bytes"] == 1_234_567  # the index is believed
    assert report["stored"]["num_files"] == 2
    assert set(report["stored"]["dtypes"]) == {"F8_E4M3", "F32"}
    assert report["released_precision"] == "fp8"
    same = report.keys() - {"model", "stored"}
    assert {key: report[key] for key in same} == {key: local[key] for key in same}

    shards = [file for file in hub.num_bytes if file.endswith(".safetensors")]
    assert shards == ["model-00001-of-000002.safetensors"]
    assert hub.num_bytes[shards[0]] <= 100_001 < (hub.folder / shards[0]).stat().st_size / 10
    assert all(asked for method, path, asked in hub.requests if path.endswith(".safetensors"))


def test_draft_layers_that_the_hubs_index_has_not_are_not_counted(
    hub: Hub, inspect_online: Callable[..., Result]
) -> None:
    index_path = hub.folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    kept = {name: file for name, file in index["weight_map"].items() if ".layers.3." not in name}
    index_path.write_text(json.dumps(index | {"weight_map": kept}))
    assert inspect_online("org/model", hub.endpoint, "--json").json["extra_parameters"] == {}


def test_a_single_file_on_the_hub_is_described_from_its_header(
    hub: Hub, inspect_online: Callable[..., Result]
) -> None:
    shutil.rmtree(hub.folder)
    shutil.copytree(TINY, hub.folder)
    report = inspect_online("org/model", hub.endpoint, "--json").json
    assert report["stored"]["num_files"] == 1
    assert report["stored"]["dtypes"] == ["BF16", "F32"]
    file_size = (TINY / "model.safetensors").stat().st_size
    assert 0 < file_size - report["stored"]["num_bytes"] < 100_000
    assert hub.num_bytes["model.safetensors"] <= 100_001


def test_what_is_in_the_cache_is_described_offline(
    hub: Hub, inspect_online: Callable[..., Result]
) -> None:
    online = inspect_online("org/model", hub.endpoint, "--json").json
    num_requests = len(hub.requests)
    offline = inspect_online("org/model", hub.endpoint, "--json", offline=True).json
    assert offline["stored"] == online["stored"] | {"dtypes": []}
    assert offline["num_parameters"] == online["num_parameters"]
    assert len(hub.requests) == num_requests


@pytest.mark.parametrize(
    ("hub_id", "words"),
    [
        ("other/model", ["other/model: no such model on the hub"]),
        ("gated/model", ["gated/model: gated", "HF_TOKEN"]),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_line(
    hub_id: str, words: list[str], hub: Hub, inspect_online: Callable[..., Result]
) -> None:
    assert inspect_online(hub_id, hub.endpoint).is_refused(*words)


def test_a_repository_without_config_is_one_line(
    hub: Hub, inspect_online: Callable[..., Result]
) -> None:
    (hub.folder / "config.json").unlink()
    assert inspect_online("org/model", hub.endpoint).is_refused("the repository has no config.json")


def test_a_damaged_header_on_the_hub_is_named(
    hub: Hub, inspect_online: Callable[..., Result]
) -> None:
    file_name = "model-00001-of-000002.safetensors"
    (hub.folder / file_name).write_bytes(b"\x10" + b"\x00" * 7 + b"{" * 16)
    assert inspect_online("org/model", hub.endpoint).is_refused(f"org/model: {file_name}: ")


def test_no_network_is_one_line_and_no_wait(inspect_online: Callable[..., Result]) -> None:
    started = time.monotonic()
    result = inspect_online("org/model", "http://127.0.0.1:9")
    assert result.is_refused("org/model: not in the Hugging Face cache", "cannot be reached")
    assert time.monotonic() - started < 15  # the library alone retries for 23 s
