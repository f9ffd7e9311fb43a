"""What the server writes to its terminal or log file, by one thread that may wait for it.

A pipe that nobody reads or a paused terminal holds up this thread only. What does not fit its
queue is dropped and counted; what cannot be written is dropped too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TextIO

MAX_WAITING = 10_000
MAX_FIELD_CHARS = 4096
CLOSE_SECONDS = 1.0

Write = Callable[[], object]


class Output:
    """A daemon thread that carries out writes in order."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.num_dropped = 0
        self._writes: queue.Queue[Write | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def put(self, write: Write) -> None:
        """Have ``write`` carried out, soon and elsewhere. Never waits."""
        try:
            self._writes.put_nowait(write)
        except queue.Full:
            self.num_dropped += 1

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the thread write what is there, unless that takes longer."""
        with contextlib.suppress(queue.Full):
            self._writes.put_nowait(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (write := self._writes.get()) is not None:
            # rich turns a broken pipe into SystemExit; whatever a write meets, the next one follows
            with contextlib.suppress(BaseException):
                write()
            if self.num_dropped and self._writes.empty():
                num_dropped, self.num_dropped = self.num_dropped, 0
                logging.getLogger("fathom").warning(
                    "%d lines were lost while the output was blocked", num_dropped
                )


class LogHandler(logging.Handler):
    """Hands formatted records to an `Output`."""

    def __init__(self, output: Output, stream: TextIO | None) -> None:
        super().__init__()
        self._output = output
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        stream = self._stream
        if stream is None:  # standard error was closed before the start
            return
        try:
            line = self.format(record) + "\n"
        except Exception:
            self.handleError(record)
            return

        def write() -> None:
            stream.write(line)
            stream.flush()

        self._output.put(write)


class TextFormatter(logging.Formatter):
    """``2026-11-26T12:00:00.123Z INFO message name=value …``."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{_time(record)} {record.levelname} {_cut(self._message(record))}"
        fields: dict[str, object] = getattr(record, "fields", {})
        for name, value in fields.items():
            text += f" {name}={'-' if value is None else _quoted(_cut(str(value)))}"
        return text

    def _message(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return f"{message}\n{self.formatException(record.exc_info)}" if record.exc_info else message


class JsonFormatter(TextFormatter):
    """One JSON object a line: ``time``, ``level``, ``message`` and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        entry = {
            "time": _time(record),
            "level": record.levelname,
            "message": _cut(self._message(record)),
            **{
                name: _cut(value) if isinstance(value, str) else value
                for name, value in fields.items()
            },
        }
        return json.dumps(entry, ensure_ascii=True)


@contextlib.contextmanager
def logging_to(output: Output, *, as_json: bool) -> Iterator[None]:
    """Send every logger's records through ``output`` to standard error."""
    handler = LogHandler(output, sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_FIELD_CHARS else f"{text[:MAX_FIELD_CHARS]}…"


def _quoted(text: str) -> str:
    """A field that a client chose cannot pretend to be others, or another line."""
    plain = text.isprintable() and text.isascii() and text and not set(text) & set(' ="')
    return text if plain else json.dumps(text)
