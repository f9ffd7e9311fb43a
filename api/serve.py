"""`fathom serve`: the port, the engine process, the keys, then uvicorn until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h11
import uvicorn
from rich.console import Console
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.app import ServerState, create_app
from api.errors import envelope
from api.keys import KeyStore
from api.terminal import describe, loading_bar
from runtime import (
    BadRequest,
    Checkpoint,
    ConfigError,
    EngineClient,
    EngineConfig,
    Tokenizer,
    find_checkpoint,
    inspect_checkpoint,
)

KEEP_ALIVE_SECONDS = 75
"""Above the idle time of every client's connection pool we know, so that no reuse meets a close."""
DRAIN_SECONDS = 4
"""How long a stopping server lets answers finish before it ends them with an error."""
SHUTDOWN_SECONDS = 5
FIRST_KEY = "default"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where to listen and under which names the model answers."""

    host: str
    port: int
    model_names: tuple[str, ...]
    needs_key: bool = True


class Protocol(H11Protocol):
    """h11 whose refusals of malformed HTTP are in the error envelope too."""

    def send_400_response(self, msg: str) -> None:
        error = BadRequest(msg, code="invalid_http")
        body = json.dumps(envelope(error)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: `serve_forever` decides when to stop, and how.

    Whoever still waits for an answer when the time to shut down is over gets an error, not a cut.
    """

    end_streams: Callable[[], None] = staticmethod(lambda: None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self.end_streams)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_forever(config: EngineConfig, options: ServeOptions) -> None:
    """Load the model and serve until SIGINT or SIGTERM.

    Raises `ConfigError` or `CheckpointError` before any long work where that is possible: flags,
    port, keys, files and tensor headers are checked before a weight is read.
    """
    console = Console(highlight=False, soft_wrap=True)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    listener = bind(options.host, options.port)
    with contextlib.closing(listener):
        store = open_keys(options)
        config.resolve_device()
        folder = find_checkpoint(config.model)
        checkpoint = inspect_checkpoint(folder)
        tokenizer = Tokenizer.load(folder)
        asyncio.run(_serve(config, options, listener, store, checkpoint, tokenizer, console))


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises `ConfigError` if it is taken or not ours."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, got {port}")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is not an address of this machine: {error}") from None
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise cannot_listen(host, port, error) from None
    return listener


def cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another with --port")


def open_keys(options: ServeOptions) -> KeyStore | None:
    """The key store, or None if the user wants no keys on a loopback address.

    Raises `ConfigError` for an address that others can reach without a key.
    """
    if not options.needs_key:
        if not is_loopback(options.host):
            raise ConfigError(f"--no-key is for this machine only; --host {options.host} is not")
        return None
    store = KeyStore.open()
    if not is_loopback(options.host) and not has_keys(store):
        raise ConfigError(
            f"--host {options.host} can be reached by others and there is no API key; make one "
            "first with `fathom keys create NAME`"
        )
    return store


def has_keys(store: KeyStore) -> bool:
    return any(entry.revoked_at is None for entry in store.list())


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(
    config: EngineConfig,
    options: ServeOptions,
    listener: socket.socket,
    store: KeyStore | None,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    started = time.monotonic()
    with loading_bar(console, options.model_names[0]) as progress:
        engine = EngineClient(config, progress)
        info = await engine.start()
    try:
        state = ServerState(
            engine=engine,
            tokenizer=tokenizer,
            defaults=checkpoint.generation,
            model_names=options.model_names,
            keys=store,
            created=int(time.time()),
            system_fingerprint=fingerprint(checkpoint.folder),
            max_model_len=info.max_model_len,
        )
        server = Server(
            uvicorn.Config(
                create_app(state),
                http=Protocol,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        server.end_streams = lambda: engine.end_all("The server is shutting down.")
        _stop_on_signals(server)
        for line in describe(info, time.monotonic() - started):
            console.print(line, markup=False)
        try:
            listener.listen()  # before the address is shown: whoever asks at once is answered
        except OSError as error:
            raise cannot_listen(options.host, options.port, error) from None
        announce(console, options, listener.getsockname()[1], store)
        await server.serve(sockets=[listener])
    finally:
        await engine.stop()


def _stop_on_signals(server: Server) -> None:
    """The first SIGINT or SIGTERM ends gracefully, the second at once."""

    def stop() -> None:
        if server.should_exit:
            server.end_streams()
        server.force_exit = server.should_exit
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


def announce(console: Console, options: ServeOptions, port: int, store: KeyStore | None) -> None:
    """The address, a key, and a request to try at once."""
    secret, about_key = a_key(options, store)
    host = f"[{options.host}]" if ":" in options.host else options.host
    base = f"http://{host}:{port}/v1"
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": options.model_names[-1], "messages": messages}
    text = f"""\
serving  {base}  as {", ".join(options.model_names)}

{about_key}

Try it in another terminal:

curl {base}/chat/completions \\
  -H "Authorization: Bearer {secret}" -H "Content-Type: application/json" \\
  -d '{json.dumps(body)}'

Ctrl-C stops the server."""
    console.print(text, markup=False)


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
    if not is_loopback(options.host):
        return "$FATHOM_API_KEY", lasting
    secret = store.lend()
    return secret, f"A key for this run:  {secret}\n{lasting}"


def fingerprint(folder: Path) -> str:
    """Names the model's configuration in answers: `fp_` and ten hex digits."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return f"fp_{digest.hexdigest()[:10]}"
