"""A Hub on this machine: the endpoints that publishing and loading use, with faults on demand, in plain `http.server`.

    with Hub() as hub:
        hub.fail("POST", r"/commit/", status=503)
        ...                                   # a client whose HF_ENDPOINT is hub.url
        hub.files("someone/model")            # path -> bytes on main
        hub.requests                          # everything it received

Two origins, as the real one has: `hub.url` answers the API, `hub.store_url` keeps large files. Commits are all or
nothing, refuse a large file that was never uploaded, and refuse a `parentCommit` that is not the head.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_" + "Zx9" * 11 + "q"
"""The one token that may write."""


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    origin: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    status: int = 0

    @property
    def authorised(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def raw(self) -> bytes:
        """All of it, for searching."""
        head = "\n".join([self.line, json.dumps(self.query), *(f"{k}: {v}" for k, v in self.headers.items())])
        return head.encode() + b"\n\n" + self.body


@dataclass
class Fault:
    """What goes wrong: `kind` is an HTTP status, or close, lost (done, but not answered), truncate, or a function."""

    method: str
    path: str
    kind: int | str | Callable[[Request, str], None]
    count: int
    skip: int
    headers: dict[str, str]

    def due(self, request: Request) -> bool:
        if self.count == 0 or request.method != self.method or not re.search(self.path, request.path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.count -= 1
        return True


@dataclass
class Blob:
    """Content of one file; `large` files live in the store."""

    content: bytes
    large: bool = False
    xet: tuple[str, str, int] | None = None
    """sha256, hash in the Xet storage, and size, where the content lives there."""

    @property
    def sha256(self) -> str:
        return self.xet[0] if self.xet else hashlib.sha256(self.content).hexdigest()

    @property
    def size(self) -> int:
        return self.xet[2] if self.xet else len(self.content)

    @property
    def git(self) -> str:
        content = self.content
        if self.large:
            head = "version https://git-lfs.github.com/spec/v1\n"
            content = f"{head}oid sha256:{self.sha256}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def facts(self, path: str) -> dict[str, Any]:
        facts = {"type": "file", "path": path, "size": self.size, "oid": self.git}
        if self.large:
            facts["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return {**facts, "xetHash": self.xet[1]} if self.xet else facts


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    """One model repository: commits, and the branches, tags and pull requests that point at them."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", None, "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})

    def commit(self, ref: str, parent: str | None, title: str, tree: dict[str, Blob]) -> Commit:
        listing = json.dumps(
            [parent, title, sorted((path, blob.git) for path, blob in tree.items()), len(self.commits)]
        )
        commit = Commit(hashlib.sha1(listing.encode()).hexdigest(), parent, title, tree)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return self.commits[oid]


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Hub:
    """The server; use as a context manager."""

    def __init__(self, large_from: int = 1024, xet: Path | None = None):
        self.large_from = large_from
        self.xet = xet
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.servers = [_Server(self, origin) for origin in ("hub", "store")]

    def __enter__(self) -> Hub:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer no more."""
        for server in self.servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def store_url(self) -> str:
        return f"http://127.0.0.1:{self.servers[1].server_port}"

    def fail(
        self, method: str, path: str, kind: Any, count: int = 1, skip: int = 0, headers: dict[str, str] | None = None
    ) -> None:
        """From now on, `count` requests that match go wrong, after the first `skip` of them."""
        self.faults.append(Fault(method, path, kind, count, skip, headers or {}))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repos[name].at(revision).tree.items()}

    def titles(self, name: str, revision: str = "main") -> list[str]:
        """Commit titles of a revision, oldest first."""
        repo, titles = self.repos[name], []
        oid: str | None = repo.at(revision).oid
        while oid:
            titles.append(repo.commits[oid].title)
            oid = repo.commits[oid].parent
        return titles[::-1]

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        with self.lock:
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and method == request.method.replace("HEAD", "GET") and (request.origin == "store") == pattern.startswith("/lfs-store"):  # fmt: skip
                    # revisions and paths arrive percent-encoded, and are decoded after the path is split
                    parts = {k: urllib.parse.unquote(v) for k, v in match.groupdict().items() if v is not None}
                    return _response(function(self, request, **parts))
        raise Refused(404, f"no route for {request.line}")

    def repo(self, request: Request, name: str, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and not request.authorised):
            raise Refused(404 if request.authorised else 401, "Repository not found", "RepoNotFound")
        if write:
            _authorise(request)
        return repo


Answer = Any


def _response(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
    if isinstance(body, bytes):
        return status, headers, body
    return status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()


def _authorise(request: Request) -> None:
    if not request.authorised:
        raise Refused(401, "Invalid username or password.")


def whoami(hub: Hub, request: Request) -> Answer:
    _authorise(request)
    return {"type": "user", "name": "someone", "orgs": [], "auth": {"type": "access_token"}}


def create(hub: Hub, request: Request) -> Answer:
    _authorise(request)
    wish = json.loads(request.body)
    name = f"{wish.get('organization') or 'someone'}/{wish['name']}"
    answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.repos:
        return 409, {}, {**answer, "error": "You already created this model repo"}
    hub.repos[name] = Repo(name, wish.get("visibility") == "private" or bool(wish.get("private")))
    return answer


def validate_yaml(hub: Hub, request: Request) -> Answer:
    content = json.loads(request.body)["content"]
    if not content.startswith("---"):
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    return {"errors": [], "warnings": []}


def info(hub: Hub, request: Request, name: str, rev: str = "main") -> Answer:
    repo = hub.repo(request, name)
    commit = repo.at(rev)
    siblings = [{"rfilename": path} for path in sorted(commit.tree)]
    return {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}


def tree(hub: Hub, request: Request, name: str, rev: str, path: str = "") -> Answer:
    """Two entries a page, so that clients must follow the links."""
    entries = sorted(hub.repo(request, name).at(rev).tree.items())
    entries = [(p, blob) for p, blob in entries if not path or p.startswith(path + "/")]
    start = int(request.query.get("cursor", 0))
    headers = {}
    if start + 2 < len(entries):
        query = urllib.parse.urlencode({**request.query, "cursor": start + 2})
        headers["Link"] = f'<{hub.url}{request.path}?{query}>; rel="next"'
    return 200, headers, [blob.facts(p) for p, blob in entries[start : start + 2]]


def paths_info(hub: Hub, request: Request, name: str, rev: str) -> Answer:
    found = hub.repo(request, name).at(rev).tree
    asked = urllib.parse.parse_qs(request.body.decode()).get("paths", [])
    return [found[path].facts(path) for path in asked if path in found]


def refs(hub: Hub, request: Request, name: str) -> Answer:
    repo = hub.repo(request, name)

    def rows(items: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": n.removeprefix(prefix), "ref": n if n.startswith("refs/") else prefix + n, "targetCommit": oid} for n, oid in items.items()]  # fmt: skip

    pulls = {ref: oid for ref, oid in repo.refs.items() if ref.startswith("refs/pr/")}
    branches = {ref: oid for ref, oid in repo.refs.items() if ref not in pulls}
    answer = {"branches": rows(branches, "refs/heads/"), "tags": rows(repo.tags, "refs/tags/"), "converts": []}
    return {**answer, "pullRequests": rows(pulls, "refs/pr/")} if request.query.get("include_prs") else answer


def branch(hub: Hub, request: Request, name: str, rev: str) -> Answer:
    repo = hub.repo(request, name, write=True)
    if rev in repo.refs:
        return 409, {}, {"error": "Reference already exists"}
    start = json.loads(request.body or b"{}").get("startingPoint", "main")
    repo.refs[rev] = repo.at(start).oid
    return {}


def tag(hub: Hub, request: Request, name: str, rev: str) -> Answer:
    repo, wish = hub.repo(request, name, write=True), json.loads(request.body)
    if wish["tag"] in repo.tags:
        return 409, {}, {"error": "Tag reference exists already."}
    repo.tags[wish["tag"]] = repo.at(rev).oid
    return {}


def preupload(hub: Hub, request: Request, name: str, rev: str) -> Answer:
    known = hub.repo(request, name, write=True).at(rev).tree
    answers = []
    for file in json.loads(request.body)["files"]:
        large = file["size"] >= hub.large_from and not file["path"].endswith((".json", ".md", ".txt", ".py"))
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in known:
            blob = known[file["path"]]
            answer["oid"] = blob.sha256 if blob.large else blob.git
        answers.append(answer)
    return {"files": answers}


def lfs_batch(hub: Hub, request: Request, name: str) -> Answer:
    hub.repo(request, name, write=True)
    objects = []
    for wanted in json.loads(request.body)["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.store:
            answer["actions"] = {
                "upload": {"href": f"{hub.store_url}/lfs-store/{wanted['oid']}"},
                "verify": {"href": f"{hub.url}/lfs-verify"},
            }
        objects.append(answer)
    return {"transfer": "basic", "objects": objects}


def lfs_put(hub: Hub, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "the content does not have this hash")
    hub.store[oid] = request.body
    return b""


def lfs_get(hub: Hub, request: Request, oid: str) -> Answer:
    return 200, {"Content-Type": "application/octet-stream"}, hub.store[oid]


def lfs_verify(hub: Hub, request: Request) -> Answer:
    _authorise(request)
    wanted = json.loads(request.body)
    if len(hub.store.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refused(422, "the upload is incomplete")
    return {}


def commit(hub: Hub, request: Request, name: str, rev: str) -> Answer:
    repo = hub.repo(request, name, write=True)
    head, changed = repo.at(rev), {}
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit") not in (None, head.oid):
        raise Refused(412, f"parentCommit {header['parentCommit']} is not the head {head.oid}")
    changed = dict(head.tree)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            changed[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            in_xet = xet_hashes(hub.xet).get(value["oid"]) if hub.xet else None
            if in_xet is None and len(hub.store.get(value["oid"], b"")) != value["size"]:
                raise Refused(400, f"{value['path']}: its content was never uploaded")
            found = (value["oid"], in_xet, value["size"]) if in_xet else None
            changed[value["path"]] = Blob(hub.store.get(value["oid"], b""), large=True, xet=found)
        elif line["key"] == "deletedFile" and changed.pop(value["path"], None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    if request.query.get("create_pr"):
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        made = repo.commit(f"refs/pr/{number}", head.oid, header["summary"], changed)
        url = f"{hub.url}/{name}/discussions/{number}"
    else:
        made, url = repo.commit(rev, head.oid, header["summary"], changed), None
    return {"commitUrl": f"{hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid, "pullRequestUrl": url}


def resolve(hub: Hub, request: Request, name: str, rev: str, path: str) -> Answer:
    found = hub.repo(request, name).at(rev)
    if path not in found.tree:
        raise Refused(404, "Entry not found", "EntryNotFound")
    blob = found.tree[path]
    headers = {"X-Repo-Commit": found.oid, "ETag": f'"{blob.git}"', "Accept-Ranges": "bytes"}
    if not blob.large:
        return 200, headers, blob.content
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    if blob.xet:
        headers |= {
            "X-Xet-Hash": blob.xet[1],
            "Link": f'<{hub.url}/api/models/{name}/xet-read-token/{rev}>; rel="xet-auth"',
        }
    # another origin: on a redirect to the same one, clients lose these headers
    return 302, {**headers, "Location": f"{hub.store_url}/lfs-store/{blob.sha256}"}, b""


def xet_token(hub: Hub, request: Request, name: str, rev: str) -> Answer:
    """Leads to a folder: `local://` is a scheme that xet-core keeps for its own tests."""
    hub.repo(request, name)
    if hub.xet is None:
        raise Refused(404, "this Hub has no Xet storage")
    url, access, until = f"local://{hub.xet}", "xet-access", 4_000_000_000
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": access, "X-Xet-Token-Expiration": str(until)}
    return 200, headers, {"casUrl": url, "accessToken": access, "exp": until}


def xet_hashes(folder: Path) -> dict[str, str]:
    """sha256 -> Xet hash of every file in the local storage, read from its shards.

    A shard is a header of 48 bytes and then, a file: a record (hash, flags, number of segments), as many segments, as
    many again where bit 31 is set, and one with the sha256 where bit 30 is. A record of 0xFF ends the list.
    """
    found = {}
    for path in folder.rglob("*.mdb"):
        data, at = path.read_bytes(), 48
        while data[at : at + 32].strip(b"\xff"):
            flags, count = struct.unpack_from("<II", data, at + 32)
            end = at + 48 + 48 * count * (2 if flags >> 31 else 1)
            if flags >> 30 & 1:
                found[_xet_text(data[end : end + 32])] = _xet_text(data[at : at + 32])
                end += 48
            at = end
    return found


def _xet_text(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


def auth_check(hub: Hub, request: Request, name: str) -> Answer:
    hub.repo(request, name, write=True)
    return {}


_MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", _MODEL, info),
    ("GET", _MODEL + "/revision/(?P<rev>[^/]+)", info),
    ("GET", _MODEL + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", _MODEL + "/paths-info/(?P<rev>[^/]+)", paths_info),
    ("GET", _MODEL + "/refs", refs),
    ("GET", _MODEL + "/auth-check/write", auth_check),
    ("GET", _MODEL + "/xet-(?:read|write)-token/(?P<rev>[^/]+)", xet_token),
    ("POST", _MODEL + "/branch/(?P<rev>[^/]+)", branch),
    ("POST", _MODEL + "/tag/(?P<rev>[^/]+)", tag),
    ("POST", _MODEL + "/preupload/(?P<rev>[^/]+)", preupload),
    ("POST", _MODEL + "/commit/(?P<rev>[^/]+)", commit),
    ("POST", "/(?P<name>[^/]+/[^/]+)[.]git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs-store/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("GET", "/lfs-store/(?P<oid>[0-9a-f]{64})", lfs_get),
    ("POST", "/lfs-verify", lfs_verify),
    ("GET", "/(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", resolve),
]


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the faults act on it, answers."""

    protocol_version = "HTTP/1.1"
    # one packet an answer: separate ones wait for each other
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server
    timeout = 20

    def handle_all(self) -> None:
        hub, split = self.server.hub, urllib.parse.urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(urllib.parse.parse_qsl(split.query))
        request = Request(self.command, self.server.origin, split.path, query, headers, self._body(headers))
        with hub.lock:
            hub.requests.append(request)
            fault = next((fault for fault in hub.faults if fault.due(request)), None)
        kind = fault.kind if fault else None
        if callable(kind):
            kind(request, "before")
        if kind == "close":
            return self._hang_up()
        try:
            if isinstance(kind, int):
                raise Refused(kind, f"injected {kind}", {404: "RepoNotFound"}.get(kind, ""))
            status, extra, body = hub.answer(request)
        except Refused as refused:
            status, body = refused.status, json.dumps({"error": refused.message}).encode()
            extra = {"X-Error-Message": refused.message, "Content-Type": "application/json"}
            extra |= {"X-Error-Code": refused.code} if refused.code else {}
            extra |= fault.headers if fault else {}
        request.status = status
        if callable(kind):
            kind(request, "after")
        if kind == "lost":
            return self._hang_up()
        try:
            self.send_response(status)
            for name, value in extra.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if kind == "truncate" else body)
            if kind == "truncate":
                self._hang_up()
        except OSError:
            self.close_connection = True  # the client is gone, as a killed one is

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_all

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """The list of requests is the log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, origin: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.origin = hub, origin

    def handle_error(self, *_: Any) -> None:
        """A client that goes away in the middle is part of the tests."""
