"""Fetching images: a server on a loopback address that misbehaves in many ways, and addresses that are refused."""

import gzip
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from conftest import encode

import luthier.serving.fetch as fetch
from luthier.images.decode import decode_rgb


class MisbehavingHandler(BaseHTTPRequestHandler):
    """Answers each path with another fault."""

    busy = 0
    agents: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        MisbehavingHandler.agents.append(self.headers["User-Agent"])
        getattr(self, self.path.split("?")[0].strip("/").replace("-", "_").replace(".", "_"), self.missing)()

    def respond(self, status, data=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def missing(self):
        self.respond(404)

    def good_png(self):
        self.respond(200, encode("red", 1), Content_Type="image/png")

    def chunked_png(self):  # as uploads to a store are marked, which are stored as they are
        self.respond(200, encode("red", 1), Content_Type="image/png", Content_Encoding="aws-chunked")

    def plain(self):  # what many servers call a file without an extension
        self.respond(200, encode("red", 1), Content_Type="text/plain")

    def late_png(self):
        time.sleep(0.5)
        self.good_png()

    def html_png(self):
        self.respond(200, b"<html>log in</html>", Content_Type="text/html")

    def html_as_png(self):
        self.respond(200, b"<html>log in</html>", Content_Type="image/png")

    def cut_png(self):
        self.respond(200, encode("red", 1)[:100], Content_Length="5000")

    def packed_png(self):
        self.respond(200, gzip.compress(encode("red", 1)), Content_Type="image/png", Content_Encoding="gzip")

    def loop(self):
        self.respond(302, Location="/loop")

    def inside(self):
        self.respond(302, Location="http://169.254.169.254/latest/meta-data/")

    def to_nowhere(self):
        self.respond(302, Location="http://[::1")

    def colourful(self):
        self.send_response(404, "\x1b[31mred")
        self.end_headers()

    def to_file(self):
        self.respond(302, Location="file:///etc/passwd")

    def round_about(self):
        self.respond(301, Location="good.png")

    def busy_png(self):
        MisbehavingHandler.busy += 1
        if MisbehavingHandler.busy < 3:
            self.respond(429, Retry_After="0.1")
        else:
            self.good_png()

    def always_busy(self):
        self.respond(429, Retry_After="3600")

    def endless(self):
        self.respond(200, Content_Type="image/png")
        for _ in range(1000):
            self.wfile.write(bytes(2**20))

    def drip(self):
        self.respond(200, Content_Type="image/png")
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def drip_headers(self):
        for letter in b"HTTP/1.1 200 OK\r\n" + b"X-Header: a\r\n" * 50:
            self.wfile.write(bytes([letter]))
            self.wfile.flush()
            time.sleep(0.1)

    def garbage(self):
        self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")


@pytest.fixture(scope="module")
def server():
    class QuietServer(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # clients disconnect on purpose

    http_server = QuietServer(("127.0.0.1", 0), MisbehavingHandler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()


@pytest.mark.parametrize(
    "path", ["good.png", "plain", "chunked.png", "round-about", "busy.png", "good.png?a=ü b", "good.png?\udcff"]
)
def test_good_image_is_fetched(server, path):
    assert decode_rgb(fetch.fetch(f"{server}/{path}", allow_private=True)).image.size == (48, 40)
    assert MisbehavingHandler.agents[-1].startswith("Luthier/")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "answers 404 Not Found"),
        ("html.png", "text/html, not an image"),
        ("cut.png", "cut before the image was complete"),
        ("loop", "after 6 requests"),
        ("to-file", "only http and https"),
        ("always-busy", "answers 429"),
        ("to-nowhere", r"'http://\[::1', where the server redirects to, is no address"),
        ("colourful", r"^the server answers 404 \[31mred$"),
        ("endless", "larger than 32 MB: download the image first"),
        ("garbage", "does not speak HTTP"),
        ("packed.png", "compressed data, which was not asked for"),
    ],
)
def test_bad_answer_gives_one_message(server, path, message):
    with pytest.raises(OSError, match=message):
        fetch.fetch(f"{server}/{path}", allow_private=True)


def test_host_with_many_addresses_has_all_of_the_time_to_answer(server, monkeypatch):
    monkeypatch.setattr(fetch, "_resolve", lambda *_: ["127.0.0.1"] * 12)
    assert fetch.fetch(f"{server}/late.png", seconds=4)


@pytest.mark.parametrize("path", ["drip", "drip-headers"])
def test_slow_answer_ends_at_the_deadline(server, path):
    start = time.monotonic()
    with pytest.raises(OSError, match="took too long"):
        fetch.fetch(f"{server}/{path}", allow_private=True, seconds=1)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url",
    ["ftp://example.org/a.png", "file:///etc/passwd", "http://", "http://[::1", "https://a b/", "http://a:99999/"],
)
def test_addresses_other_than_http_are_refused(url):
    with pytest.raises(OSError, match=r"only http|no host|its host or its port cannot be"):
        fetch.fetch(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "[::1]", "[fe80::1]",
        "2130706433", "[fc00::1]", "[::ffff:127.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "100.64.0.1",
        "224.0.0.1", "[64:ff9b:1::7f00:1]", "[fec0::1]", "[::127.0.0.1]", "168.63.129.16",
        "192.0.0.192", "[5f00::1]", "[2001:0:5db8:d822:0:0:80ff:fffe]", "[::ffff:0:7f00:1]",
    ],
)  # fmt: skip
def test_private_addresses_are_refused(host):
    with pytest.raises(OSError, match="is not public"):
        fetch.fetch(f"http://{host}/a.png")


def test_redirect_to_a_private_address_is_refused(server, monkeypatch):
    """The first address counts as public; the address of the redirect is checked too."""
    port = int(server.rsplit(":", 1)[1])
    resolve = socket.getaddrinfo

    def as_public(host, *rest, **options):
        return resolve("127.0.0.1" if host == "image.example" else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", as_public)
    monkeypatch.setattr(fetch, "_is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(OSError, match=r"169.254.169.254 is not public"):
        fetch.fetch(f"http://image.example:{port}/inside")


def test_address_that_was_checked_is_the_one_that_is_fetched_from(server, monkeypatch):
    """A name may resolve to an address of this machine's network the second time."""
    names, resolve = [], socket.getaddrinfo

    def record(host, *rest, **options):
        names.append(host)
        return resolve("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", record)
    monkeypatch.setattr(fetch, "_is_public", lambda address: address == "127.0.0.1")
    assert fetch.fetch(f"http://image.example:{server.rsplit(':', 1)[1]}/good.png")
    assert names.count("image.example") == 1


def test_host_with_one_private_address_is_refused(monkeypatch):
    entries = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("127.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(OSError, match=r"is not public \(127.0.0.1\)"):
        fetch.fetch("http://image.example/")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl for a certificate")
def test_slow_answer_ends_at_the_deadline_over_tls_too(tmp_path, monkeypatch):
    options = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"), "-subj", "/CN=localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *options], check=True, capture_output=True
    )
    https_server = ThreadingHTTPServer(("127.0.0.1", 0), MisbehavingHandler)
    https_server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    https_server.socket = context.wrap_socket(https_server.socket, server_side=True)
    threading.Thread(target=https_server.serve_forever, daemon=True).start()
    monkeypatch.setattr(ssl, "create_default_context", ssl._create_unverified_context)
    url = f"https://localhost:{https_server.server_port}"
    assert fetch.fetch(f"{url}/good.png", allow_private=True)
    start = time.monotonic()
    with pytest.raises(OSError, match="took too long"):
        fetch.fetch(f"{url}/drip", allow_private=True, seconds=1)
    assert time.monotonic() - start < 5
    https_server.shutdown()


@pytest.mark.parametrize(
    ("platform", "code", "message"),
    [("darwin", 20, "Install Certificates.command"), ("darwin", 10, "has expired"), ("linux", 20, "has expired")],
)
def test_missing_certificates_on_macos_are_explained(server, monkeypatch, platform, code, message):
    class Context:
        def wrap_socket(self, plain, server_hostname):
            error = ssl.SSLCertVerificationError(1, "certificate has expired")
            error.verify_code = code
            raise error

    monkeypatch.setattr(ssl, "create_default_context", Context)
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(OSError, match=message):
        fetch.fetch(f"{server.replace('http:', 'https:')}/good.png", allow_private=True)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:4700:4700::1111", "64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_public(address):
    assert fetch._is_public(address)
