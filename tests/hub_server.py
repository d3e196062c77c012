"""A local server that stands in for the Hugging Face Hub: pushing and loading over HTTP, with faults on demand.

huggingface_hub can create, commit to, list and resolve models, datasets and Spaces; large files use LFS. `Hub.fail`
makes the next requests that match fail.
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
PAGE = 3  # entries on one page of a listing


@dataclass
class Fault:
    """A fault of the next `times` requests whose `METHOD path` matches `pattern`."""

    pattern: str
    times: int
    status: int | None  # None: the connection is cut
    headers: dict = field(default_factory=dict)
    count: int = 0  # requests that failed so far


@dataclass
class Repository:
    """A repository: its commits, each a mapping of path to contents."""

    private: bool
    sdk: str | None = None
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])
    large: set[str] = field(default_factory=set)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.commits[-1]

    @property
    def sha(self) -> str:
        """The hash of the newest commit, as long as git's."""
        return hashlib.sha1(f"{len(self.commits)} {sorted(self.files)}".encode()).hexdigest()


class Hub:
    """The server. It runs inside `with Hub() as hub:`, and `hub.url` is its HF_ENDPOINT."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}  # by "models/me/x"
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.corrupt = False  # whether LFS uploads are damaged on the way
        self.users = {TOKEN: "me"}  # by token
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
        """Return the environment of a client of this server. Xet is off: only the real Hub has a server for it."""
        login = {"HF_TOKEN": token} if token else {}
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",  # where the machine has a proxy
            "no_proxy": "127.0.0.1",
        } | login

    def fail(self, pattern: str, status: int | None, times: int = 1, **headers: str) -> Fault:
        """Make the next requests that match fail: with an HTTP status, or with a cut connection (None)."""
        fault = Fault(pattern, times, status, {key.replace("_", "-"): value for key, value in headers.items()})
        self.faults.append(fault)
        return fault

    def add(self, kind: str, name: str, folder: Path, private: bool = False) -> Repository:
        """Add a folder as a repository; `kind` is models, datasets or spaces."""
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
            if fault.times > fault.count and re.search(fault.pattern, f"{self.command} {path}"):
                fault.count += 1
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
        for methods, pattern, handler in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                return handler(self, body, **match.groupdict())
        self._respond(404, {"error": f"no route {self.command} {path}"})

    def _break(self, fault: Fault) -> None:
        if fault.status is None:
            if self.command == "PUT":  # in the middle of the upload
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._respond(fault.status, {"error": f"fault {fault.status}"}, fault.headers)

    def _respond(self, status: int, content: dict | list | bytes, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        response_headers = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        for key, value in response_headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self) -> str | None:
        return self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _repository(self, kind: str, name: str) -> Repository | None:
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository and (not repository.private or self._user() == name.split("/")[0]):
            return repository
        # As on the real Hub: the answer does not reveal which private names exist.
        status = 404 if self._user() else 401
        self._respond(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return None

    def whoami(self, body: bytes) -> None:
        if self._user():
            self._respond(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})
        else:
            self._respond(401, {"error": "Invalid username or password."})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        kind, user = f"{request.get('type') or 'model'}s", self._user()
        owner = request.get("organization") or user
        key = f"{kind}/{owner}/{request['name']}"
        private = request.get("visibility") == "private" or bool(request.get("private"))
        if user is None:
            self._respond(401, {"error": "Invalid credentials in Authorization header"})
        elif owner != user:
            self._respond(403, {"error": "You don't have the rights to create a repo under this namespace"})
        elif key in self.hub.repositories:
            prefix = "" if kind == "models" else f"{kind}/"
            self._respond(
                409,
                {"error": "You already created this repo", "url": f"{self.hub.url}/{prefix}{owner}/{request['name']}"},
            )
        else:
            self.hub.repositories[key] = Repository(private, request.get("sdk"))
            prefix = "" if kind == "models" else f"{kind}/"
            self._respond(200, {"url": f"{self.hub.url}/{prefix}{owner}/{request['name']}", "name": request["name"]})

    def validate(self, body: bytes) -> None:
        request = json.loads(body)
        metadata = re.match(r"---\n(.*?)\n---", request["content"], re.S)
        errors = [] if metadata and isinstance(yaml.safe_load(metadata[1]), dict) else [{"message": "no metadata"}]
        self._respond(400 if errors else 200, {"errors": errors, "warnings": []})

    def check_rights(self, body: bytes, kind: str, name: str) -> None:
        if self._repository(kind, name):
            allowed = self._user() == name.split("/")[0]
            self._respond(200 if allowed else 403, {} if allowed else {"error": "Forbidden"})

    def preupload(self, body: bytes, kind: str, name: str) -> None:
        if repository := self._repository(kind, name):
            self._respond(200, {"files": [self._mode(repository, file["path"]) for file in json.loads(body)["files"]]})

    def _mode(self, repository: Repository, path: str) -> dict:
        is_large, data = path.endswith(LFS), repository.files.get(path)
        oid = None if data is None else hashlib.sha256(data).hexdigest() if is_large else _blob_hash(data)
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for requested in json.loads(body)["objects"]:
            entry = {"oid": requested["oid"], "size": requested["size"]}
            if requested["oid"] not in self.hub.objects:
                actions = {"upload": f"{self.hub.url}/lfs/{requested['oid']}", "verify": f"{self.hub.url}/lfs-verify"}
                entry["actions"] = {kind: {"href": href} for kind, href in actions.items()}
            objects.append(entry)
        self._respond(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        self.hub.objects[oid] = b"damaged" + body if self.hub.corrupt else body
        self._respond(200, {})

    def verify(self, body: bytes) -> None:
        request = json.loads(body)
        if hashlib.sha256(self.hub.objects.get(request["oid"], b"")).hexdigest() == request["oid"]:
            self._respond(200, {})
        else:
            self.hub.objects.pop(request["oid"], None)
            self._respond(400, {"error": "the file that arrived has another hash"})

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
        reply = {"commitUrl": f"{self.hub.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}
        self._respond(200, reply | {"success": True, "hookOutput": ""})

    def info(self, body: bytes, kind: str, name: str) -> None:
        if repository := self._repository(kind, name):
            siblings = [{"rfilename": path} for path in repository.files]
            reply = {
                "_id": "0",
                "id": name,
                "sha": repository.sha,
                "private": repository.private,
                "siblings": siblings,
            }
            reply |= {"sdk": repository.sdk} if repository.sdk else {}
            reply |= {"modelId": name, "tags": [], "gated": False, "disabled": False, "downloads": 0}
            self._respond(200, reply)

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
            return self._respond(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        cursor = int((re.search(r"cursor=(\d+)", self.path) or [0, 0])[1])
        first_page = re.sub(r"[?&]cursor=\d+", "", self.path)
        link = f'<{self.hub.url}{first_page}{"&" if "?" in first_page else "?"}cursor={cursor + PAGE}>; rel="next"'
        headers = {"Link": link} if cursor + PAGE < len(entries) else {}
        self._respond(200, entries[cursor : cursor + PAGE], headers)

    def _entry(self, repository: Repository, path: str) -> dict:
        data = repository.files[path]
        entry = {"type": "file", "oid": _blob_hash(data), "size": len(data), "path": path}
        if path in repository.large:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def paths_info(self, body: bytes, kind: str, name: str) -> None:
        if repository := self._repository(kind, name):
            paths = [part.removeprefix("paths=") for part in unquote(body.decode()).split("&")]
            if body.startswith(b"{"):
                paths = json.loads(body)["paths"]
            self._respond(200, [self._entry(repository, path) for path in paths if path in repository.files])

    def resolve(self, body: bytes, name: str, path: str, kind: str = "models/") -> None:
        if not (repository := self._repository(kind.strip("/"), name)):
            return
        if path not in repository.files:
            return self._respond(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = repository.files[path]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{_blob_hash(data)}"', "Accept-Ranges": "bytes"}
        if path in repository.large:
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": f'"{digest}"'}
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(byte_range[1]), int(byte_range[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._respond(206, data[first : last + 1], headers | {"Content-Type": "application/octet-stream"})
        self._respond(200, data, headers | {"Content-Type": "application/octet-stream"})


def _blob_hash(data: bytes) -> str:
    """Return the hash that git gives to a file's contents."""
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
