"""A Hub on this machine: the endpoints that huggingface_hub's client calls to push and pull, and ways for them to fail.

Everything is kept in memory. `requests` lists what was asked for, so that a test can say what travelled.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Branches by name, each a list of (commit, files by path); the last one is what a reader of the branch sees."""

    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    is_gated: bool = False

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)


class Hub:
    """What the server has, what it was asked for, and how it fails.

    break_upload: from which large file on (0: the first one to come) connections are closed after so many bytes.
    break_download: path to bytes after which the connection is closed, for each coming request.
    served: path to bytes that are served instead of those that were committed.
    before: path of a GET to what happens once, right before its answer.
    failing: paths that are answered by an error of the server.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received: dict[str, int] = {}
        self.sent: dict[str, int] = {}
        self.break_upload: dict[int, int] = {}
        self.break_download: dict[str, list[int]] = {}
        self.served: dict[str, bytes] = {}
        self.before: dict[str, Callable[[], object]] = {}
        self.failing: set[str] = set()
        self.url = ""

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].at(revision)[1]

    def commits(self, repo_id: str, revision: str = "main") -> list[tuple[str, dict[str, bytes]]]:
        return self.repositories[repo_id].branches[revision][1:]

    def forget(self) -> None:
        """Begin to count anew."""
        self.requests.clear(), self.received.clear(), self.sent.clear()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A Hub that answers at `hub.url` until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, content: object = None, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        # The client asks for this by itself, once a day and for no repository.
        if path != "/api/agent-harnesses":
            self.hub.requests.append((self.command, path))
        if any(path.endswith(name) for name in self.hub.failing):
            self._body()
            return self._answer({"error": "broken"}, 500)
        for method, pattern, answer in _ROUTES:
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                is_read = self.command == "GET"
                if is_read and (happens := self.hub.before.pop(path, None)) is not None:
                    happens()
                return answer(self, **match.groupdict())
        self._body()
        self._refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit, or None after the refusal has been sent."""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.is_gated and self.headers.get("Authorization") != "Bearer hf_invited":
            self._refuse(403, "GatedRepo")
        elif (commit := repository.at(revision)) is None:
            self._refuse(404, "RevisionNotFound")
        else:
            return commit
        return None

    def _entries(self, repo: str, files: dict[str, bytes]) -> list[dict]:
        entries = []
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(content)}
            if path in self.hub.repositories[repo].large:
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def create(self) -> None:
        asked = json.loads(self._body())
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._answer({"url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = Repository({"main": [(_sha256(name.encode())[:40], {})]})
        self._answer({"url": f"{self.hub.url}/{name}"})

    def info(self, repo: str, revision: str = "main") -> None:
        if (found := self._find(repo, revision)) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self._answer({"id": repo, "sha": found[0], "siblings": siblings, "private": False, "tags": []})

    def branch(self, repo: str, name: str) -> None:
        self._body()
        branches = self.hub.repositories[repo].branches
        if name in branches:
            return self._refuse(409, "BranchExists")
        branches[name] = list(branches["main"])
        self._answer({})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        if (found := self._find(repo, revision)) is not None:
            self._answer(self._entries(repo, found[1]))

    def paths_info(self, repo: str, revision: str) -> None:
        asked = json.loads(self._body())["paths"]
        if (found := self._find(repo, revision)) is not None:
            self._answer(self._entries(repo, {path: found[1][path] for path in asked if path in found[1]}))

    def validate(self) -> None:
        self._body()
        self._answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self._body())["files"]
        if (found := self._find(repo, revision)) is None:
            return
        entries = {e["path"]: e.get("lfs", e)["oid"] for e in self._entries(repo, found[1])}
        self._answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                        "shouldIgnore": False,
                        "oid": entries.get(file["path"]),
                    }
                    for file in asked
                ]
            }
        )

    def batch(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self._body())["objects"]:
            place = {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}
            known = asked["oid"] in self.hub.large_files
            objects.append({**asked, **({} if known else {"actions": place})})
        self._answer({"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        for first, limit in self.hub.break_upload.items():
            if len(self.hub.large_files) < first:
                continue
            self.rfile.read(limit)
            self.close_connection = True
            return self.connection.close()
        content = self._body()
        self.hub.received[oid] = len(content)
        if _sha256(content) != oid:
            return self._refuse(400, "WrongContent")
        self.hub.large_files[oid] = content
        self._answer({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        if (found := self._find(repo, revision)) is None:
            return
        if lines[0]["value"].get("parentCommit") not in (None, found[0]):
            return self._refuse(412, "AnotherCommitMeanwhile")
        files = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
                self.hub.repositories[repo].large.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = _sha256(json.dumps([found[0], lines]).encode())[:40]
        branches, answer = self.hub.repositories[repo].branches, {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            revision = f"refs/pr/{number}"
            branches[revision] = [found]
            answer = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"}
        branches[revision].append((oid, files))
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, **answer})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        commit = {"X-Repo-Commit": found[0]}
        if path not in found[1]:
            return self._answer(b"", 404, {**commit, "X-Error-Code": "EntryNotFound"})
        content = found[1][path]
        etag = _sha256(content) if path in self.hub.repositories[repo].large else _blob_oid(content)
        content = self.hub.served.get(path, content)
        headers = {**commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status, start, end = 200, 0, len(content)
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            start, end = int(asked[1]), min(end, int(asked[2]) + 1) if asked[2] else end
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{len(content)}"
        if self.command == "HEAD":
            return self._answer(content[start:end], status, headers)
        limits = self.hub.break_download.get(path)
        if limits and (limit := limits.pop(0)) < end - start:
            self.send_response(status)
            for name, value in {"Content-Length": end - start, **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content[start : start + limit])
            self.hub.sent[path] = self.hub.sent.get(path, 0) + limit
            self.close_connection = True
            return self.connection.close()
        self.hub.sent[path] = self.hub.sent.get(path, 0) + end - start
        self._answer(content[start:end], status, headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", _Handler.receive),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_oid(content: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
