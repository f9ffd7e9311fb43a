"""What the command line shows: loading progress, start-up summary, sizes as people write them."""

from __future__ import annotations

import re

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from runtime import ConfigError, EngineInfo

UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_bytes(text: str, flag: str) -> int:
    """``"8GiB"``, ``"512 MB"`` or plain bytes as a number. Raises `ConfigError` naming ``flag``."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise ConfigError(f"{flag} {text!r} is not a size; write for example 8GiB or 512MB")
    return int(float(match[1]) * UNITS[match[2]])


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that keeps the number at or above 1."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_count(count: int) -> str:
    """A number of parameters in millions or billions, as models are named after."""
    return f"{count / 1e6:,.1f} M" if count < 10**9 else f"{count / 1e9:,.2f} B"


class LoadingBar:
    """A progress bar over weight bytes: done, rate and time left. It draws only when told to."""

    def __init__(self, console: Console, name: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._shown = console.is_terminal
        self._task = self._bar.add_task(f"Loading {name}", total=None)

    def start(self) -> None:
        if self._shown:
            self._bar.start()

    def stop(self) -> None:
        if self._shown:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, refresh=self._shown)


def describe(info: EngineInfo, seconds: float) -> list[str]:
    """The start-up summary: what was loaded, where, and what it leaves room for."""
    capacity = info.num_pages * info.page_size
    precision = info.dtype if info.quantization == "none" else f"{info.quantization}, {info.dtype}"
    return [
        f"model    {info.model}",
        f"         {info.architecture}, {info.num_parameters / 1e6:,.1f} M parameters, "
        f"{precision} ({format_bytes(info.weight_bytes)}), loaded in {seconds:.1f} s",
        f"device   {info.device}",
        f"cache    {info.num_pages:,} pages of {info.page_size} tokens = {capacity:,} tokens "
        f"({format_bytes(info.kv_cache_bytes)})",
        f"limits   context {info.max_model_len:,} tokens, {info.max_num_seqs} sequences at once, "
        f"{info.max_step_tokens:,} tokens a step",
    ]
