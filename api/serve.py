"""`fathom serve`: the port, the keys, the engine process and uvicorn, from start to end.

The port answers before the model is loaded: `/ready` says how far it is. From the first line to the
last, a signal ends the server in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import resource
import shlex
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from api.app import ServerState, create_app
from api.connections import ACCEPTED_AT_ONCE, protocol_class, raise_file_limit
from api.keys import KeyStore
from api.ledger import Ledger, ledger_path
from api.limits import Limits
from api.listen import cannot_listen, is_loopback, listening_on, tls_context
from api.memory import keep_giving_back
from api.output import Output, logging_to
from api.running import Running
from api.server import Server
from api.terminal import LoadingBar, describe
from runtime import (
    Checkpoint,
    ConfigError,
    EngineClient,
    EngineConfig,
    EngineInfo,
    SupervisorPolicy,
    Tokenizer,
    find_checkpoint,
    inspect_checkpoint,
    return_large_blocks,
)

FIRST_KEY = "default"
HERE = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""What to write in a URL on this machine for a host that is listened on."""
MAX_DRAIN_SECONDS = 86_400.0
STACK_BYTES = 16 << 20
"""Of a thread; schemas are compiled in one. With `ulimit -s unlimited` it would have 2 MiB."""
ENGINE_SECONDS = 0.3
"""How long a hurried end waits for the engine, which dies with this process anyway."""
ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/?#\s]*")
HOST = re.compile(r"\*|[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?")
STOPPING = (signal.SIGINT, signal.SIGTERM)
IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where to listen, under which names the model answers, and how long things may take.

    Raises `ConfigError` for values that cannot be.
    """

    host: str
    port: int
    model_names: tuple[str, ...]
    needs_key: bool = True
    uds: Path | None = None  # a Unix socket in place of host and port
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    allowed_origins: frozenset[str] = frozenset()
    allowed_hosts: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    drain_seconds: float = 30.0
    watchdog_seconds: float = 60.0
    log_json: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.drain_seconds <= MAX_DRAIN_SECONDS:
            raise ConfigError(
                f"--drain must be between 0 and {MAX_DRAIN_SECONDS:g} seconds, "
                f"got {self.drain_seconds:g}"
            )
        if not 1 <= self.watchdog_seconds <= MAX_DRAIN_SECONDS:
            raise ConfigError(
                f"--watchdog must be between 1 and {MAX_DRAIN_SECONDS:g} seconds, "
                f"got {self.watchdog_seconds:g}"
            )
        if "*" in self.allowed_hosts and not self.needs_key:
            raise ConfigError(
                "--allowed-host '*' with --no-key would let any web page use the server; name the "
                "hosts, or leave --no-key out"
            )
        for origin in self.allowed_origins:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allowed-origin {origin!r} is not an origin; write SCHEME://HOST or "
                    "SCHEME://HOST:PORT in lower case, without a path"
                )
        for host in self.allowed_hosts:
            if not HOST.fullmatch(host):
                raise ConfigError(
                    f"--allowed-host {host!r} is not a host name or address; leave out scheme and "
                    "port"
                )

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.uds is not None or is_loopback(self.host)

    @property
    def address(self) -> str:
        return str(self.uds or f"{self.host}:{self.port}")


def serve_forever(config: EngineConfig, options: ServeOptions) -> None:
    """Load the model and serve until SIGINT or SIGTERM; then this process is over.

    Raises `ConfigError` or `CheckpointError` if it cannot start: flags, port, keys, files and
    tensor headers are checked before a weight is read.
    """
    _reserve_standard_files()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold keys and prompts
    threading.stack_size(STACK_BYTES)
    raise_file_limit()
    return_large_blocks()
    output = Output()
    with contextlib.ExitStack() as stack:
        stack.enter_context(handling_signals(lambda: os._exit(0)))  # before and after the loop
        stack.callback(output.close)
        stack.enter_context(logging_to(output, as_json=options.log_json))
        tls = tls_context(options.tls_certificate, options.tls_key)
        listener = stack.enter_context(listening_on(options.host, options.port, options.uds))
        store, ledger = open_keys(options), None
        if store is not None:
            stack.callback(store.close)
            ledger = Ledger(ledger_path(store.path), options.model_names[0])
            stack.callback(ledger.close)
            ledger.start()
        config.resolve_device()
        checkpoint = inspect_checkpoint(find_checkpoint(config.model))
        service = Service(config, options, listener, tls, store, ledger, checkpoint, output)
        try:
            asyncio.run(service.run())
        except BaseException:
            service.finish_preparing()
            raise
    # Not by way of Python's own end: it would wait for a blocked output and for prompts that are
    # being encoded.
    os._exit(0)


class Service:
    """One run of the server, from the moment its address is its own."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServeOptions,
        listener: socket.socket,
        tls: ssl.SSLContext | None,
        store: KeyStore | None,
        ledger: Ledger | None,
        checkpoint: Checkpoint,
        output: Output,
    ) -> None:
        self.options = options
        self.listener = listener
        self.tls = tls
        self.store = store
        self.output = output
        self.console = Console(highlight=False, soft_wrap=True)
        self.preparing: threading.Thread | None = None
        self.bar = LoadingBar(self.console, options.model_names[0])
        policy = SupervisorPolicy(
            max_waiting=options.limits.queue,
            queue_seconds=options.limits.queue_seconds,
            watchdog_seconds=options.watchdog_seconds,
        )
        self.engine = EngineClient(config, self._show_progress, policy=policy)
        self.state = ServerState(
            engine=self.engine,
            tokenizer=Tokenizer.load(checkpoint.folder),
            defaults=checkpoint.generation,
            model_names=options.model_names,
            keys=store,
            created=int(time.time()),
            system_fingerprint=fingerprint(checkpoint.folder),
            allowed_origins=options.allowed_origins,
            allowed_hosts=options.allowed_hosts | own_names(options),
            limits=options.limits,
            running=Running(ledger),
        )

    async def run(self) -> None:
        """Serve until told to stop. Raises what `EngineClient.start` raises, and `ConfigError` if
        another process took the address meanwhile.
        """
        try:
            self.listener.listen(ACCEPTED_AT_ONCE)
        except OSError as error:
            raise cannot_listen(self.options.address, error) from None
        server = self._server()
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        with handling_signals(lambda: loop.call_soon_threadsafe(server.stop)):
            serving = asyncio.create_task(server.serve(sockets=[self.listener]))
            loading = asyncio.create_task(self.engine.start())
            watching = asyncio.create_task(self._watch_keys())
            giving_back = asyncio.create_task(keep_giving_back())
            self.output.put(self.bar.start)
            try:
                await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
                self.output.put(self.bar.stop)
                if loading.done() and not server.should_exit:
                    self._announce(loading.result(), time.monotonic() - started)
                await serving
            finally:
                if not server.should_exit:
                    server.stop()
                loading.cancel()
                watching.cancel()
                giving_back.cancel()
                patience = ENGINE_SECONDS if server.hurried else None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.engine.stop(), patience)
                tasks = (serving, loading, watching, giving_back)
                await asyncio.gather(*tasks, return_exceptions=True)

    def _server(self) -> Server:
        config = uvicorn.Config(
            create_app(self.state),
            http=protocol_class(self.options.limits),
            lifespan="off",
            ws="none",
            workers=1,
            log_config=None,
            log_level="error",  # not a line for every malformed request
            backlog=ACCEPTED_AT_ONCE,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody could send them
        )
        config.load()
        config.ssl = self.tls
        return Server(config, self.state.running, self.options.drain_seconds)

    async def _watch_keys(self) -> None:
        if self.store is not None:
            await self.state.running.watch_keys(self.store)

    def _show_progress(self, done: int, total: int) -> None:
        if self.preparing is None:  # not before: the start of the engine process wants the lock
            prepare = self.state.tokenizer.grammar_vocabulary.prepare
            self.preparing = threading.Thread(target=prepare, name="grammars", daemon=True)
            self.preparing.start()
        self.output.put(lambda: self.bar.update(done, total))

    def finish_preparing(self) -> None:
        """Python's own end can crash beside a thread that still computes."""
        if self.preparing is not None:
            self.preparing.join()

    def _announce(self, info: EngineInfo, seconds: float) -> None:
        text = banner(self.options, self.listener.getsockname(), self.store)
        lines = "\n".join([*describe(info, seconds), text])
        self.output.put(lambda: self.console.print(lines, markup=False))


def open_keys(options: ServeOptions) -> KeyStore | None:
    """The key store, or None if the user wants no keys on a loopback address.

    Raises `ConfigError` for an address that others can reach without a key.
    """
    if not options.needs_key:
        if not options.is_private:
            raise ConfigError(f"--no-key is for this machine only; --host {options.host} is not")
        return None
    store = KeyStore.open()
    if not options.is_private and not has_keys(store):
        store.close()
        raise ConfigError(
            f"--host {options.host} can be reached by others and there is no API key; make one "
            "first with `fathom keys create NAME`"
        )
    return store


def has_keys(store: KeyStore) -> bool:
    return any(store.is_active(entry.public_id) for entry in store.list())


def own_names(options: ServeOptions) -> frozenset[str]:
    """Names under which others on the network know this machine; addresses need no list."""
    if options.is_private:
        return frozenset()
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return frozenset({options.host.lower(), name, short, f"{short}.local"})


def banner(
    options: ServeOptions, bound: str | tuple[str | int, ...], store: KeyStore | None
) -> str:
    """Where the server listens, a key, and a request to try at once."""
    secret, about_key = a_key(options, store)
    scheme = "https" if options.tls_certificate else "http"
    curl = "curl"
    if isinstance(bound, str):
        curl, base, place = (
            f"curl --unix-socket {shlex.quote(bound)}",
            f"{scheme}://localhost",
            bound,
        )
    else:
        host = HERE.get(options.host, options.host)
        base = f"{scheme}://{_with_port(host, bound[1])}"
        place = _with_port(str(bound[0]), bound[1])
    body = {
        "model": options.model_names[-1],
        "messages": [{"role": "user", "content": "hello"}],
    }
    notes = [about_key]
    if not options.is_private and options.tls_certificate is None:
        notes.append(
            "Plain HTTP: keys and answers can be read on this network. Use --tls-cert and "
            "--tls-key, a VPN or an ssh tunnel."
        )
    page = "" if isinstance(bound, str) else f"\n         {base}/  in a browser"
    return f"""\
serving  {base}/v1  as {", ".join(options.model_names)}
         listening on {place}{page}

{chr(10).join(notes)}

Try it in another terminal:

{curl} {base}/v1/chat/completions \\
  -H "Authorization: Bearer {secret}" -H "Content-Type: application/json" \\
  -d {shlex.quote(json.dumps(body))}

Ctrl-C stops the server."""


def a_key(options: ServeOptions, store: KeyStore | None) -> tuple[str, str]:
    """``(key for the printed request, what to say about keys)``.

    The first start makes a lasting key. Later ones cannot show it again, so on this machine the
    request gets a key that lives as long as the server.
    """
    if store is None:
        return "none", "No key is needed: any program on this machine can use the server."
    if not has_keys(store):
        secret = store.create(FIRST_KEY)
        return secret, f"Your API key, shown only now:  {secret}"
    lasting = "Lasting keys: `fathom keys list`, `fathom keys create NAME`."
    if not options.is_private:
        return "$FATHOM_API_KEY", lasting
    secret = store.lend()
    return secret, f"A key for this run:  {secret}\n{lasting}"


def fingerprint(folder: Path) -> str:
    """Names the model's configuration in answers: `fp_` and ten hex digits."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return f"fp_{digest.hexdigest()[:10]}"


@contextlib.contextmanager
def handling_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Have SIGINT and SIGTERM call ``stop``, and no other signal end the process by accident."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, on_signal) for number in STOPPING}
    before |= {number: signal.signal(number, signal.SIG_IGN) for number in IGNORED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reserve_standard_files() -> None:
    """A file that was closed before the start must not become the number of a socket."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _with_port(host: str, port: str | int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
