"""A Hub on a loopback address: enough of its protocol for pushing and loading, over real HTTP, and faults on demand.

Models, datasets and Spaces are created, committed to, listed and resolved as huggingface_hub asks for it; large files
go by LFS. `Hub.fail` makes the next requests that match fail.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopbackSecretToken0123456789abcdef"
LFS = (".safetensors", ".png", ".parquet")
PAGE = 3  # entries of a listing before the next Link


@dataclass
class Fault:
    """What goes wrong: with requests whose `METHOD path` matches, the next `times` of them."""

    pattern: str
    times: int
    status: int | None  # None: the connection is cut
    headers: dict = field(default_factory=dict)
    seen: int = 0


@dataclass
class Repository:
    """A repository: its commits, each a mapping of path to contents."""

    private: bool
    sdk: str | None = None
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])
    large: set[str] = field(default_factory=set)

    @property
    def files(self) -> dict[str, bytes]:
        """Files of the newest commit."""
        return self.commits[-1]

    @property
    def sha(self) -> str:
        """A name for the newest commit, as long as git's."""
        return hashlib.sha1(f"{len(self.commits)} {sorted(self.files)}".encode()).hexdigest()


class Hub:
    """The server, from `with Hub() as hub` on; `hub.url` is its HF_ENDPOINT."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}  # by "models/me/x"
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.corrupt = False  # what arrives by LFS is damaged on the way
        self.readers = {TOKEN: "me"}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment of a client that knows this Hub alone; Xet has no server outside of the real one."""
        login = {"HF_TOKEN": token} if token else {}
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        } | login

    def fail(self, pattern: str, status: int | None, times: int = 1, **headers: str) -> Fault:
        """Make requests fail: with an HTTP status, or (None) by a cut connection."""
        fault = Fault(pattern, times, status, {key.replace("_", "-"): value for key, value in headers.items()})
        self.faults.append(fault)
        return fault

    def add(self, kind: str, name: str, folder: Path, private: bool = False) -> Repository:
        """Put a folder there as a repository; `kind` is models, datasets or spaces."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repository = Repository(private, commits=[files])
        repository.large = {path for path in files if path.endswith(LFS)}
        self.repositories[f"{kind}/{name}"] = repository
        return repository


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for fault in self.hub.faults:
            if fault.times > fault.seen and re.search(fault.pattern, f"{self.command} {path}"):
                fault.seen += 1
                return self._break(fault)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(length)
        self.hub.bodies.append(body)
        for method, pattern, answer in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return answer(self, body, **match.groupdict())
        self._say(404, {"error": f"no route {self.command} {path}"})

    def _break(self, fault: Fault) -> None:
        if fault.status is None:
            if self.command == "PUT":  # in the middle of what is sent
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._say(fault.status, {"error": f"fault {fault.status}"}, fault.headers)

    def _say(self, status: int, content: dict | list | bytes, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        given = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        for key, value in given.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self) -> str | None:
        return self.hub.readers.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repository(self, kind: str, name: str) -> Repository | None:
        found = self.hub.repositories.get(f"{kind}/{name}")
        if found and (not found.private or self._user() == name.split("/")[0]):
            return found
        # As the Hub does, so that nobody learns which private names exist.
        status = 404 if self._user() else 401
        self._say(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return None

    def whoami(self, body: bytes) -> None:
        if self._user():
            self._say(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})
        else:
            self._say(401, {"error": "Invalid username or password."})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        kind, user = f"{asked.get('type') or 'model'}s", self._user()
        owner = asked.get("organization") or user
        key = f"{kind}/{owner}/{asked['name']}"
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        if user is None:
            self._say(401, {"error": "Invalid credentials in Authorization header"})
        elif owner != user:
            self._say(403, {"error": "You don't have the rights to create a repo under this namespace"})
        elif key in self.hub.repositories:
            prefix = "" if kind == "models" else f"{kind}/"
            self._say(
                409,
                {"error": "You already created this repo", "url": f"{self.hub.url}/{prefix}{owner}/{asked['name']}"},
            )
        else:
            self.hub.repositories[key] = Repository(private, asked.get("sdk"))
            prefix = "" if kind == "models" else f"{kind}/"
            self._say(200, {"url": f"{self.hub.url}/{prefix}{owner}/{asked['name']}", "name": asked["name"]})

    def validate(self, body: bytes) -> None:
        asked = json.loads(body)
        front = re.match(r"---\n(.*?)\n---", asked["content"], re.S)
        wrong = [] if front and isinstance(yaml.safe_load(front[1]), dict) else [{"message": "no metadata"}]
        self._say(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def check_rights(self, body: bytes, kind: str, name: str) -> None:
        if self._repository(kind, name):
            right = self._user() == name.split("/")[0]
            self._say(200 if right else 403, {} if right else {"error": "Forbidden"})

    def preupload(self, body: bytes, kind: str, name: str) -> None:
        if repository := self._repository(kind, name):
            self._say(200, {"files": [self._mode(repository, file["path"]) for file in json.loads(body)["files"]]})

    def _mode(self, repository: Repository, path: str) -> dict:
        large, there = path.endswith(LFS), repository.files.get(path)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _blob(there)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                actions = {"upload": f"{self.hub.url}/lfs/{wanted['oid']}", "verify": f"{self.hub.url}/lfs-verify"}
                entry["actions"] = {kind: {"href": href} for kind, href in actions.items()}
            objects.append(entry)
        self._say(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        self.hub.objects[oid] = b"damaged" + body if self.hub.corrupt else body
        self._say(200, {})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        if hashlib.sha256(self.hub.objects.get(asked["oid"], b"")).hexdigest() == asked["oid"]:
            self._say(200, {})
        else:
            self.hub.objects.pop(asked["oid"], None)
            self._say(400, {"error": "the file that arrived has another hash"})

    def commit(self, body: bytes, kind: str, name: str) -> None:
        if not (repository := self._repository(kind, name)):
            return
        files = dict(repository.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        repository.commits.append(files)
        said = {"commitUrl": f"{self.hub.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}
        self._say(200, said | {"success": True, "hookOutput": ""})

    def info(self, body: bytes, kind: str, name: str) -> None:
        if repository := self._repository(kind, name):
            siblings = [{"rfilename": path} for path in repository.files]
            said = {"_id": "0", "id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings}
            self._say(200, said | {"modelId": name, "tags": [], "gated": False, "disabled": False, "downloads": 0})

    def tree(self, body: bytes, kind: str, name: str, folder: str = "") -> None:
        if not (repository := self._repository(kind, name)):
            return
        recursive = "recursive=True" in self.path or "recursive=true" in self.path
        prefix = f"{folder}/" if folder else ""
        entries, folders = [], set()
        for path in sorted(path for path in repository.files if path.startswith(prefix)):
            parts = path.removeprefix(prefix).split("/")
            folders |= (
                {prefix + "/".join(parts[:n]) for n in range(1, len(parts))}
                if recursive
                else ({prefix + parts[0]} if len(parts) > 1 else set())
            )
            if recursive or len(parts) == 1:
                entries.append(self._entry(repository, path))
        entries = [{"type": "directory", "oid": "0", "size": 0, "path": path} for path in sorted(folders)] + entries
        if not entries and folder:
            return self._say(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        cursor = int((re.search(r"cursor=(\d+)", self.path) or [0, 0])[1])
        bare = re.sub(r"[?&]cursor=\d+", "", self.path)
        more = f'<{self.hub.url}{bare}{"&" if "?" in bare else "?"}cursor={cursor + PAGE}>; rel="next"'
        headers = {"Link": more} if cursor + PAGE < len(entries) else {}
        self._say(200, entries[cursor : cursor + PAGE], headers)

    def _entry(self, repository: Repository, path: str) -> dict:
        data = repository.files[path]
        entry = {"type": "file", "oid": _blob(data), "size": len(data), "path": path}
        if path in repository.large:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def paths_info(self, body: bytes, kind: str, name: str) -> None:
        if repository := self._repository(kind, name):
            asked = [part.removeprefix("paths=") for part in unquote(body.decode()).split("&")]
            if body.startswith(b"{"):
                asked = json.loads(body)["paths"]
            self._say(200, [self._entry(repository, path) for path in asked if path in repository.files])

    def resolve(self, body: bytes, name: str, path: str, kind: str = "models/") -> None:
        if not (repository := self._repository(kind.strip("/"), name)):
            return
        if path not in repository.files:
            return self._say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = repository.files[path]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{_blob(data)}"', "Accept-Ranges": "bytes"}
        if path in repository.large:
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": f'"{digest}"'}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(span[1]), int(span[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._say(206, data[first : last + 1], headers | {"Content-Type": "application/octet-stream"})
        self._say(200, data, headers | {"Content-Type": "application/octet-stream"})


def _blob(data: bytes) -> str:
    """Return git's name of a file's contents."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


KIND, NAME = r"(?P<kind>models|datasets|spaces)", r"(?P<name>[^/]+/[^/]+)"
ROUTES = (
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), f"/api/{KIND}/{NAME}/auth-check(?:/write)?", _Handler.check_rights),
    (("POST",), f"/api/{KIND}/{NAME}/preupload/[^/]+", _Handler.preupload),
    (("POST",), rf"/(?:datasets/|spaces/)?{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    (("POST",), "/lfs-verify", _Handler.verify),
    (("POST",), f"/api/{KIND}/{NAME}/commit/[^/]+", _Handler.commit),
    (
        ("GET",),
        f"/api/{KIND}/{NAME}/tree/[^/]+(?:/(?P<folder>.+?))?/?",
        lambda h, b, folder=None, **m: h.tree(b, folder=folder or "", **m),
    ),
    (("POST",), f"/api/{KIND}/{NAME}/paths-info/[^/]+", _Handler.paths_info),
    (("GET",), f"/api/{KIND}/{NAME}(?:/revision/[^/]+)?", _Handler.info),
    (("GET", "HEAD"), f"/(?P<kind>datasets/|spaces/){NAME}/resolve/[^/]+/(?P<path>.+)", _Handler.resolve),
    (("GET", "HEAD"), f"/{NAME}/resolve/[^/]+/(?P<path>.+)", _Handler.resolve),
)
