"""Where the server listens: a port or a Unix socket, and TLS. All is checked before loading."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from runtime import ConfigError


@contextlib.contextmanager
def listening_on(host: str, port: int, uds: Path | None) -> Iterator[socket.socket]:
    """A socket bound to the port, or to the Unix socket ``uds``, until the block ends.

    Raises `ConfigError` if the address is taken or not ours.
    """
    if uds is None:
        with bind(host, port) as listener:
            yield listener
        return
    with bind_unix(uds) as listener:
        ours = uds.lstat()
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(ours, uds.lstat()):  # another server may have replaced it
                    uds.unlink()


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
    try:
        listener = socket.socket(family, kind, proto)
    except OSError as error:  # a machine without IPv6
        raise cannot_listen(f"{host}:{port}", error) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise cannot_listen(f"{host}:{port}", error) from None
    return listener


def bind_unix(path: Path) -> socket.socket:
    """A Unix socket that only this user may connect to, in place of one that nobody serves.

    Raises `ConfigError` for a path that is in use or cannot be a socket.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # from its first moment on nobody else can connect
    try:
        _remove_stale(path)
        listener.bind(str(path))
        listener.listen()  # at once: to another server a socket without a listener is stale
    except OSError as error:
        listener.close()
        raise cannot_listen(str(path), error) from None
    except ConfigError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"--uds {path}: there is a file that is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass
    raise ConfigError(f"--uds {path}: a server listens there already; choose another path")


def cannot_listen(address: str, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(
        f"cannot listen on {address}: {reason}; choose another address with --port, --host or --uds"
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ip_literal(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that ``text`` spells, without its zone and as IPv4 if it is mapped; or None."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS with the files' certificate chain and key, or None without them.

    Raises `ConfigError` for one without the other, and for files that do not serve.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--tls-cert and --tls-key belong together; give both or none")
    for flag, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{flag} {path}: {error.strerror}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # An empty password: OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"--tls-cert {certificate} and --tls-key {key} are not a PEM certificate and its key "
            f"without a password: {reason}"
        ) from None
    return context
