"""A program that speaks the engine's side of the wire and does what a test scripts.

It needs a twentieth of a second to start, where the real one needs seconds. The model's name is a
folder: ``starts`` lists what each process in turn does when it is started (the last goes on for
all that follow), ``log`` gets a line for each thing that happens. A prompt's first token says what
becomes of it.
"""

from __future__ import annotations

import enum
import faulthandler
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-S", "-P", str(Path(__file__).resolve()))
BEAT_SECONDS = 0.01


class Do(enum.IntEnum):
    """What the first token of a prompt asks for."""

    ANSWER = 1  # two tokens, then the end
    RUN = 2  # one token, then nothing until it is aborted
    WAIT = 3  # never starts
    DIE = 4  # starts, and the process kills itself
    HANG = 5  # starts, and the process is silent for ever
    FAULT = 6  # starts, and the process says that a step failed
    REFUSE = 7  # ends with an error without a start
    DEAF = 8  # beats go on, but nothing is read any more
    GARBAGE = 9
    CUT = 10  # half a frame, then the end
    HUGE = 11  # a frame that claims a gigabyte
    CLOSE = 12  # the socket ends, the process stays
    NONSENSE = 13  # good JSON that is no message
    ODD_EVENTS = 14  # a message without what it should hold


INFO = {
    "model": "scripted",
    "architecture": "none",
    "num_parameters": 1,
    "weight_bytes": 1,
    "device": "cpu",
    "dtype": "float32",
    "quantization": "none",
    "max_model_len": 200_000,
    "max_num_seqs": 4,
    "max_step_tokens": 512,
    "page_size": 16,
    "num_pages": 64,
    "kv_cache_bytes": 1,
    "vocab_size": 1000,
    "eos_token_ids": [0],
}


class ScriptedEngine:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.folder = Path()
        self.reads = True
        self.live: set[int] = set()

    def log(self, *words: object) -> None:
        with (self.folder / "log").open("a") as file:
            print(*words, file=file)

    def send(self, **message: Any) -> None:
        body = json.dumps(message).encode()
        self.sock.sendall(struct.pack(">I", len(body)) + body)

    def receive(self) -> dict[str, Any]:
        header = self.sock.recv(4, socket.MSG_WAITALL)
        if not header:
            raise SystemExit
        body = self.sock.recv(struct.unpack(">I", header)[0], socket.MSG_WAITALL)
        return json.loads(body)

    def run(self) -> None:
        self.folder = Path(self.receive()["config"]["model"])
        number = int((self.folder / "count").read_text() or 0)
        (self.folder / "count").write_text(str(number + 1))
        starts = (self.folder / "starts").read_text().split()
        self.start(starts[min(number, len(starts) - 1)])
        while True:
            if select.select([self.sock] if self.reads else [], [], [], BEAT_SECONDS)[0]:
                self.handle(self.receive())
            elif self.live or not self.reads:
                self.send(type="beat")

    def start(self, how: str) -> None:
        self.log("start", how, os.getpid())
        match how.split(":"):
            case ["fail"]:
                self.send(type="failed", kind="CheckpointError", text="the files are gone")
                raise SystemExit
            case ["die"]:
                os._exit(5)
            case ["load", seconds]:
                self.send(type="progress", done=1, total=4)
                time.sleep(float(seconds))
        self.send(type="ready", info=INFO)
        if how == "brief":
            time.sleep(0.02)
            os._exit(6)

    def handle(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "stop":
                raise SystemExit
            case "stats":
                self.send(type="stats", stats={"num_sequences": len(self.live)})
            case "abort":
                self.log("abort", message["seq_id"])
                self.live.discard(message["seq_id"])
                self.send(type="aborted", seq_id=message["seq_id"])
            case "add":
                self.log("add", *message["prompt_ids"][:2])
                self.add(message["seq_id"], Do(message["prompt_ids"][0]))

    def add(self, seq_id: int, do: Do) -> None:
        if do is Do.WAIT:
            return
        if do is Do.REFUSE:
            self.send(type="events", events=[[seq_id, None, "error"]])
            return
        self.send(type="started", sequences=[[seq_id, 3]])
        match do:
            case Do.ANSWER:
                self.send(type="events", events=[[seq_id, 7, None]])
                self.send(type="events", events=[[seq_id, 8, "stop"]])
            case Do.RUN:
                self.live.add(seq_id)
                self.send(type="events", events=[[seq_id, 7, None]])
            case Do.DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            case Do.HANG:
                while True:
                    time.sleep(1)
            case Do.FAULT:
                self.send(type="fault", text="RuntimeError: a kernel failed")
                os._exit(1)
            case Do.DEAF:
                self.reads = False
            case Do.GARBAGE:
                self.sock.sendall(struct.pack(">I", 5) + b"\xff\x00{[,")
            case Do.CUT:
                self.sock.sendall(struct.pack(">I", 500) + b'{"type"')
                os._exit(1)
            case Do.HUGE:
                self.sock.sendall(struct.pack(">I", 1 << 30) + b"{")
            case Do.CLOSE:
                self.sock.shutdown(socket.SHUT_WR)
                time.sleep(60)
            case Do.NONSENSE:
                self.send(type=["?"])
            case Do.ODD_EVENTS:
                self.send(type="events", events=[[seq_id]])


if __name__ == "__main__":
    faulthandler.enable()
    ScriptedEngine(socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))).run()
