"""Fetch an image from an address that anybody may have given.

Only http and https are allowed. Unless the caller allows it, no address may lead inside this machine or its network,
at any step of a redirect.
Time, bytes and steps are limited. Proxies are not used, because what they connect to cannot be checked.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import quote, urljoin, urlsplit

MAX_SECONDS = 30  # with all redirects and retries
MAX_BYTES = 32 * 2**20
MAX_REQUESTS = 6  # so five redirects
USER_AGENT = "Luthier/0.1 (image classification; fetches single images that a person named; python http.client)"
COMPRESSED = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"}  # other encodings leave bytes alone
REDIRECTS = (301, 302, 303, 307, 308)
NO_ISSUER = 20  # OpenSSL's number of "unable to get local issuer certificate"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Python calls these global, or older ones do, but they lead inside: local NAT64, old site-local and IPv4 in IPv6,
# the hosts of Azure and Oracle, segment routing.
INSIDE = [
    ipaddress.ip_network(network)
    for network in (
        "64:ff9b:1::/48",
        "fec0::/10",
        "::/96",
        "::ffff:0:0:0/96",
        "168.63.129.16/32",
        "192.0.0.0/24",
        "5f00::/16",
    )
]


def fetch(url: str, allow_private: bool = False, seconds: float = MAX_SECONDS) -> bytes:
    """Return the bytes at an http or https address.

    Args:
        url: the address.
        allow_private: allow addresses that are not public too (this machine, its network).
        seconds: limit of the whole, whatever the server does.

    Raises:
        OSError: the address is refused, not found, too large or too slow; the message says which.
    """
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REQUESTS):
        with _request(url, allow_private, deadline) as response:
            if response.status in REDIRECTS and response.headers["Location"]:
                location = response.headers["Location"].encode("latin-1").decode("utf-8", "replace")
                try:
                    url = urljoin(url, location)
                except ValueError:
                    raise OSError(f"{location[:80]!r}, where the server redirects to, is no address") from None
                continue
            pause = _retry_after(response)
            if response.status in (429, 503) and time.monotonic() + pause < deadline:
                time.sleep(pause)
                continue
            if response.status != 200:
                words = "".join(filter(str.isprintable, response.reason))
                raise OSError(f"the server answers {response.status} {words}".rstrip())
            kind = response.headers.get("Content-Type", "").partition(";")[0]
            if kind.startswith("text/") and kind != "text/plain":  # servers call a file of unknown kind plain text
                raise OSError(f"the server sends {kind}, not an image: give the address of the image itself")
            encodings = response.headers.get("Content-Encoding", "").lower().split(",")
            if COMPRESSED.intersection(map(str.strip, encodings)):
                raise OSError("the server sends compressed data, which was not asked for: download the image first")
            data = response.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise OSError(f"larger than {MAX_BYTES // 2**20} MB: download the image first")
            if response.length:  # what is left of Content-Length
                raise OSError("the connection was cut before the image was complete")
            return data
    raise OSError(f"after {MAX_REQUESTS} requests the server still redirects or asks to wait")


def _parse(url: str) -> tuple[bool, str, int, str]:
    """Return whether an address is of https, its host, its port, and what is asked for there."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = (parts.hostname or "").encode("idna").decode()
        query = f"?{parts.query}" if parts.query else ""
        target = quote(f"{parts.path or '/'}{query}", safe="/%:@!$&'()*+,;=?~", errors="surrogateescape")
    except ValueError:  # UnicodeError is one too
        raise OSError(f"{url[:80]!r} is no valid address: its host or its port cannot be") from None
    if parts.scheme not in ("http", "https") or not host:
        raise OSError(f"only http and https addresses are fetched, not {url[:80]!r}")
    if re.search(r"[^\w.:%-]", host):
        raise OSError(f"{url[:80]!r} names no host")
    return parts.scheme == "https", host, port, target


@contextlib.contextmanager
def _request(url: str, allow_private: bool, deadline: float) -> Iterator[http.client.HTTPResponse]:
    secure, host, port, target = _parse(url)
    too_slow = OSError("the server took too long")
    # Connect to the very address that was checked: a name may resolve to another one the second time.
    plain = _connect(_resolve(host, port, allow_private), port, deadline)
    left = deadline - time.monotonic()
    if left <= 0:
        plain.close()
        raise too_slow
    plain.settimeout(left)
    connection = http.client.HTTPConnection(host, port, timeout=left)
    expired = threading.Event()
    handle = plain.dup()  # TLS takes over the socket itself

    def expire() -> None:
        expired.set()
        handle.shutdown(socket.SHUT_RDWR)  # ends a pending read; the timeout of a socket limits each read only

    timer = threading.Timer(left, expire)
    timer.daemon = True
    timer.start()
    try:
        connection.default_port = 443 if secure else 80  # which the Host header leaves out
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
        headers = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        yield connection.getresponse()
        if expired.is_set():  # the closed connection looks like the end of the data
            raise too_slow
    except (http.client.HTTPException, OSError) as error:
        if expired.is_set():
            raise too_slow from error
        if isinstance(error, http.client.IncompleteRead):
            raise OSError("the connection was cut before the image was complete") from error
        if isinstance(error, http.client.HTTPException):
            raise OSError(f"the server does not speak HTTP: {error!r}") from error
        if sys.platform == "darwin" and getattr(error, "verify_code", None) == NO_ISSUER:
            raise OSError(
                "the server's certificate cannot be checked. Python from python.org has no certificates to check it "
                "with until you open 'Install Certificates.command' in its folder in Applications"
            ) from error
        raise
    finally:
        timer.cancel()
        connection.close()
        plain.close()
        handle.close()


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Return a connection to the first address that accepts one; those that are left share the time that is left."""
    failure = OSError("the server took too long")
    for number, address in enumerate(addresses):
        seconds = (deadline - time.monotonic()) / (len(addresses) - number)
        if seconds <= 0:
            break
        try:
            return socket.create_connection((address, port), timeout=seconds)
        except OSError as error:
            failure = error
    raise failure


def _resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """Return the addresses of a host; all of them must be public."""
    try:
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except socket.gaierror:
        raise OSError(f"there is no host {host!r}, or no network") from None
    if not allow_private and (inside := [address for address in addresses if not _is_public(address)]):
        raise OSError(f"{host} is not public ({inside[0]}): see --allow_private_urls of predict.py")
    return list(dict.fromkeys(addresses))


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip in NAT64:
            ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in INSIDE)


def _retry_after(response: http.client.HTTPResponse) -> float:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (TypeError, ValueError):
        return 1.0
