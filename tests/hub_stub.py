"""A local Hub for tests: what huggingface_hub 2.4 needs for create_repo, model_info, create_commit, LFS uploads and
downloads.

Two servers on 127.0.0.1, because the storage of the real Hub has a different origin too: uploads go to
`StubHub.storage`, which must not receive the Authorization header. Repos are in memory. HF_HUB_DISABLE_XET must be 1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import canary

OWNER = "me"
TOKEN = canary.HF_TOKEN
GATEWAY_PAGE = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
MODEL = r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("create", "POST", r"/api/repos/create"),
    ("validate-yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", MODEL + r"/preupload/main"),
    ("commit", "POST", MODEL + r"/commit/main"),
    ("info", "GET", MODEL + r"(/revision/(?P<revision>[\w.-]+))?"),
    ("resolve", "HEAD", r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[\w.-]+)/(?P<name>.+)"),
    ("resolve", "GET", r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[\w.-]+)/(?P<name>.+)"),
    ("get", "GET", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    ("batch", "POST", r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
)


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)  # the paths of each commit, oldest first
    revisions: tuple[str, ...] = ("main",)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """A request as received."""

    route: str
    authorization: str
    body: bytes
    storage: bool = False  # to the other origin


@dataclass
class Fault:
    """A failure of a route: an HTTP status, "drop" (closes the connection), or "silence"."""

    kind: int | str
    times: int
    body: bytes
    headers: dict[str, str]


class StubHub:
    """The servers and their state. Start with `with StubHub() as hub`; `hub.url` is the HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS contents by sha256
        self.seen: list[Seen] = []
        self.faults: dict[str, Fault] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler()) for _ in range(2)]
        # Of different names, as on the Hub: huggingface_hub 1 follows redirects to the same host, whatever the port.
        names = ("127.0.0.1", "localhost")
        self.url, self.storage = (
            f"http://{name}:{server.server_port}" for name, server in zip(names, self.servers, strict=True)
        )

    def __enter__(self) -> StubHub:
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fail(
        self, route: str, kind: int | str, times: int = 1000, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        """Let the next `times` requests to `route` fail."""
        assert route in {name for name, _, _ in ROUTES}, route
        self.faults[route] = Fault(kind, times, body, headers or {})

    def leaks(self) -> list[str]:
        """Return where a canary was sent but in the Authorization header of a request to the Hub, or is stored."""
        sent = [(seen.route, canary.leaks(seen.body)) for seen in self.seen]
        sent += [(seen.route, canary.leaks(seen.authorization.encode())) for seen in self.seen if seen.storage]
        stored = [file for repo in self.repos.values() for file in repo.files.items()] + list(self.blobs.items())
        return [f"{where}: {found}" for where, found in (*sent, *((n, canary.leaks(c)) for n, c in stored)) if found]

    def routes_seen(self) -> list[str]:
        return [seen.route for seen in self.seen]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        class Handler(_Handler):
            hub = self

        return Handler

    # ------------------------------------------------------------------------------------------------ the routes

    def create(self, body: bytes, **_: str) -> tuple[int, Any]:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        there = repo_id in self.repos
        self.repos.setdefault(repo_id, Repo(private=wanted.get("visibility") == "private"))
        return 409 if there else 200, {"url": f"{self.url}/{repo_id}", "error": "You already created this model repo"}

    def validate_yaml(self, body: bytes, **_: str) -> tuple[int, Any]:
        return 200, {"errors": [], "warnings": []}

    def info(self, body: bytes, repo: str, revision: str | None = None) -> tuple[int, Any]:
        found = self.repos[repo]
        if (revision or "main") not in (*found.revisions, found.sha):
            return 404, {"error": "Invalid rev id"}
        siblings = [
            {"rfilename": name, "size": len(content), **({"lfs": _pointer(content)} if _is_lfs(name) else {})}
            for name, content in found.files.items()
        ]
        return 200, {"id": repo, "modelId": repo, "sha": found.sha, "private": found.private, "siblings": siblings}

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> tuple[int, Any, dict[str, str]]:
        found = self.repos[repo]
        headers = {"X-Repo-Commit": found.sha}
        if name not in found.files or revision not in (*found.revisions, found.sha):
            return 404, b"", {**headers, "X-Error-Code": "EntryNotFound"}
        content = found.files[name]
        oid = hashlib.sha256(content).hexdigest()
        if not _is_lfs(name):
            return 200, content, {**headers, "ETag": f'"{oid[:40]}"'}
        self.blobs[oid] = content
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return 302, b"", {**headers, **linked, "Location": f"{self.storage}/lfs/{oid}"}

    def get(self, body: bytes, oid: str) -> tuple[int, Any]:
        return 200, self.blobs[oid]

    def preupload(self, body: bytes, repo: str) -> tuple[int, Any]:
        return 200, {"files": [self._mode(self.repos[repo], item) for item in json.loads(body)["files"]]}

    def _mode(self, repo: Repo, item: dict[str, Any]) -> dict[str, Any]:
        lfs = _is_lfs(item["path"])
        answer = {"path": item["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        content = repo.files.get(item["path"])
        if content is not None:
            blob = content if lfs else b"blob %d\0%s" % (len(content), content)
            answer["oid"] = (hashlib.sha256 if lfs else hashlib.sha1)(blob).hexdigest()
        return answer

    def batch(self, body: bytes, repo: str) -> tuple[int, Any]:
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.storage}/lfs/{item['oid']}?X-Amz-Signature=secret", "header": {}}}
            objects.append(item if item["oid"] in self.blobs else {**item, "actions": upload})
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, oid: str) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "sha256 mismatch"}
        self.blobs[oid] = body
        return 200, {}

    def commit(self, body: bytes, repo: str) -> tuple[int, Any]:
        found, changed = self.repos[repo], []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.blobs[value["oid"]]
            changed += [value["path"]] if "path" in value else []
        found.commits.append(changed)
        answer = {"commitOid": found.sha, "commitUrl": f"{self.url}/{repo}/commit/{found.sha}", "pullRequestUrl": None}
        return 200, answer


def _is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pth", ".onnx", "tokenizer.json"))


def _pointer(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer: two would wait 40 ms for each other's acknowledgement

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        matches = ((name, re.fullmatch(p, path)) for name, method, p in ROUTES if method == self.command)
        name, match = next(((name, match) for name, match in matches if match), ("unknown", None))
        with self.hub.lock:
            others = [value for key, value in self.headers.items() if key.lower() != "authorization"]
            said = "\n".join([self.path, *others]).encode() + b"\n" + body
            storage = self.server is self.hub.servers[1]
            self.hub.seen.append(Seen(name, self.headers.get("Authorization", ""), said, storage))
            fault = self.hub.faults.get(name)
            if fault and fault.times == 0:
                fault = None
            if fault:
                fault.times -= 1
        if fault:
            self._fail(fault)
        elif match is None or match.groupdict().get("repo", OWNER) not in {OWNER, *self.hub.repos}:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            route: Callable[..., tuple[Any, ...]] = getattr(self.hub, name.replace("-", "_"))
            with self.hub.lock:
                status, answer, *headers = route(body, **match.groupdict())
            self._answer(status, answer, *headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fail(self, fault: Fault) -> None:
        if fault.kind == "silence":
            self.hub.closing.wait(60)
        if isinstance(fault.kind, str):
            self.close_connection = True
            return
        self._answer(fault.kind, fault.body or {"error": "as the test asked for"}, fault.headers)

    def _answer(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(answer, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
