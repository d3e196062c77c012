"""A picture from an address that somebody gave; apart from predict.py, because the page fetches by the same rules.

Only http and https; no address inside this machine or its network, at no step of a redirect; bounded time, bytes and
steps. Proxies are not used, because what they connect to cannot be checked.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, urljoin, urlsplit

SECONDS = 30  # for all of it: redirects and repetitions too
MOST_BYTES = 32 * 2**20
MOST_STEPS = 6  # requests, so five redirects
USER_AGENT = "Luthier/0.1 (image classification; fetches single pictures that a person named; python http.client)"
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Called global by Python, though they lead to the inside: local NAT64, old site-local and IPv4 in IPv6, Azure's host.
INSIDE = [
    ipaddress.ip_network(network)
    for network in ("64:ff9b:1::/48", "fec0::/10", "::/96", "::ffff:0:0:0/96", "168.63.129.16/32")
]


def fetch(url: str, allow_private: bool = False, seconds: float = SECONDS) -> bytes:
    """Return what an http or https address holds.

    Args:
        url: the address.
        allow_private: addresses that are not public (this machine, its network) are allowed too.
        seconds: after which it is given up, whatever the server does.

    Raises:
        OSError: it was refused, not found, too large or too slow; the message says which.
    """
    deadline = time.monotonic() + seconds
    for _ in range(MOST_STEPS):
        with _request(url, allow_private, deadline) as response:
            if response.status in REDIRECTS and response.headers["Location"]:
                url = urljoin(url, response.headers["Location"].encode("latin-1").decode("utf-8", "replace"))
                continue
            pause = _retry_after(response)
            if response.status in (429, 503) and time.monotonic() + pause < deadline:
                time.sleep(pause)
                continue
            if response.status != 200:
                raise OSError(f"the server answers {response.status} {response.reason}".rstrip())
            kind = response.headers.get("Content-Type", "").partition(";")[0]
            if kind.startswith("text/"):
                raise OSError(f"the server sends {kind}, not a picture: give the address of the picture itself")
            data = response.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise OSError(f"larger than {MOST_BYTES // 2**20} MB")
            if response.length:  # what is left of Content-Length
                raise OSError("the connection was cut before the picture was complete")
            return data
    raise OSError(f"after {MOST_STEPS} requests the server still sends elsewhere, or asks to wait")


@contextmanager
def _request(url: str, allow_private: bool, deadline: float) -> Iterator[http.client.HTTPResponse]:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError:  # Unicode's errors are such too
        raise OSError(f"{url[:80]!r} names no host") from None
    if parts.scheme not in ("http", "https") or not host:
        raise OSError(f"only http and https addresses are fetched, not {url[:80]!r}")
    if re.search(r"[^\w.:%-]", host):
        raise OSError(f"{url[:80]!r} names no host")
    query = f"?{parts.query}" if parts.query else ""
    target = quote(f"{parts.path or '/'}{query}", safe="/%:@!$&'()*+,;=?~")
    left = deadline - time.monotonic()
    too_slow = OSError("the server took too long")
    if left <= 0:
        raise too_slow
    # The connection goes to the very address that was checked: a name may lead elsewhere when asked a second time.
    connection = http.client.HTTPConnection(host, port, timeout=left)
    expired = threading.Event()
    plain = _connect(_resolve(host, port, allow_private), port, left)
    handle = plain.dup()  # TLS takes the socket over

    def expire() -> None:
        expired.set()
        handle.shutdown(socket.SHUT_RDWR)  # wakes whoever reads; a time limit of the socket is one for each read only

    timer = threading.Timer(left, expire)
    timer.daemon = True
    timer.start()
    try:
        secure = parts.scheme == "https"
        connection.default_port = 443 if secure else 80  # which the Host header leaves out
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
        headers = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        yield connection.getresponse()
        if expired.is_set():  # a reader takes the shut connection for the end of the data
            raise too_slow
    except (http.client.HTTPException, OSError) as error:
        if expired.is_set():
            raise too_slow from error
        if isinstance(error, http.client.IncompleteRead):
            raise OSError("the connection was cut before the picture was complete") from error
        if isinstance(error, http.client.HTTPException):
            raise OSError(f"the server does not speak HTTP: {error!r}") from error
        raise
    finally:
        timer.cancel()
        connection.close()
        plain.close()
        handle.close()


def _connect(addresses: list[str], port: int, seconds: float) -> socket.socket:
    """Return a connection to the first address that takes one."""
    for number, address in enumerate(addresses, 1):
        try:
            return socket.create_connection((address, port), timeout=seconds / len(addresses))
        except OSError:
            if number == len(addresses):
                raise


def _resolve(host: str, port: int, allow_private: bool) -> list[str]:
    """Return the addresses of a host; all of them must be public."""
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except socket.gaierror:
        raise OSError(f"there is no host {host!r}, or no network") from None
    if not allow_private and (inside := [address for address in found if not _is_public(address)]):
        raise OSError(f"{host} is not public ({inside[0]}): see --allow_private_urls of predict.py")
    return list(dict.fromkeys(found))


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
