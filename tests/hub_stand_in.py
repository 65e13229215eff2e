"""A stand-in for the hub on loopback: the part of its HTTP interface that pushes and pulls use, strict about requests.

Repositories, visibility and tokens; the validation of a card; preupload, LFS batch, upload with its digest, verify,
commit in NDJSON; listings with sizes; files with the headers and the redirect of large ones that the client relies on.
"""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKENS = {"hf_me": "me", "hf_other": "other"}
"""Token -> its user, who may write to repositories of that name."""
LARGE = (".safetensors", ".png")
"""Files that are not kept in git itself."""


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    listed: dict[str, int | None] = field(default_factory=dict)
    """Sizes that the listing gives instead of the true ones; for files that are not there, too."""

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((digest, dict(files)))
        return digest


@dataclass
class Hub:
    """What the server holds and has seen."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Requests that the real hub does not know."""
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> Repository:
        made = self.repositories[repo] = Repository(private)
        made.commit({".gitattributes": b"", **files})
        return made

    def files(self, repo: str) -> dict[str, bytes]:
        """The newest commit, without what the hub itself puts there."""
        return {name: data for name, data in self.repositories[repo].commits[-1][1].items() if name != ".gitattributes"}


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message or code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer_or_refuse()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer_or_refuse(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.hub.asked.append(f"{self.command} {parts.path}")
        try:
            words = [unquote(word) for word in parts.path.strip("/").split("/")]
            self._route(words, parse_qs(parts.query))
        except Refused as refusal:
            body = json.dumps({"error": refusal.message}).encode()
            self._send(refusal.status, body, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message})

    def _route(self, words: list[str], query: dict[str, list[str]]) -> None:
        match (self.command, words):
            case ("POST", ["api", "repos", "create"]):
                self._create(self._json())
            case ("POST", ["api", "validate-yaml"]):
                self._validate(self._json())
            case ("GET", ["api", "models", user, name, *rest]) if rest == [] or (
                len(rest) == 2 and rest[0] == "revision"
            ):
                self._info(f"{user}/{name}", rest[1] if rest else "main", "blobs" in query)
            case ("POST", ["api", "models", user, name, "preupload", "main"]):
                self._preupload(self._writable(f"{user}/{name}"), self._json())
            case ("POST", ["api", "models", user, name, "commit", "main"]):
                self._commit(f"{user}/{name}")
            case ("POST", [user, name, "info", "lfs", "objects", "batch"]) if name.endswith(".git"):
                self._batch(f"{user}/{name.removesuffix('.git')}", self._json())
            case ("PUT", ["upload", digest]):
                if hashlib.sha256(self.body).hexdigest() != digest:
                    raise Refused(400, message="the content has another digest")
                self.hub.large[digest] = self.body
                self._send(200)
            case ("POST", ["verify"]):
                sent = self._json()
                if len(self.hub.large.get(sent["oid"], b"")) != sent["size"]:
                    raise Refused(404, message="not uploaded")
                self._send(200)
            case ("GET" | "HEAD", [user, name, "resolve", revision, *path]):
                self._file(f"{user}/{name}", revision, "/".join(path))
            case ("GET" | "HEAD", ["large", digest]):
                self._send(200, self.hub.large[digest], {"ETag": f'"{digest}"'})
            case _:
                self.hub.wrong.append(f"{self.command} {self.path}")
                raise Refused(404, message="no such endpoint")

    def _json(self) -> Any:
        if not (self.headers.get("Content-Type") or "").startswith(
            ("application/json", "application/vnd.git-lfs+json")
        ):
            raise Refused(400, message=f"a body of JSON is needed, not {self.headers.get('Content-Type')}")
        return json.loads(self.body)

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _readable(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self._user() != repo.partition("/")[0]):
            raise Refused(404 if self._user() else 401, "RepoNotFound", "Repository not found")
        return found

    def _writable(self, repo: str) -> Repository:
        found = self._readable(repo)
        if self._user() != repo.partition("/")[0]:
            raise Refused(403, message="you may not write to it")
        return found

    def _create(self, sent: dict[str, Any]) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if sent["organization"] != user or sent.get("type") not in (None, "model"):
            raise Refused(403, message="you may not make it")
        repo = f"{sent['organization']}/{sent['name']}"
        if repo in self.hub.repositories:
            raise Refused(409, message="You already created this model repo")
        self.hub.add(repo, {}, private=sent.get("visibility", "public") == "private")
        self._send_json({"url": f"{self.hub.url}/{repo}", "id": "0", "name": repo})

    def _validate(self, sent: dict[str, Any]) -> None:
        text = sent["content"]
        front = text.split("---\n")[1] if text.startswith("---\n") else "{"
        try:
            known = yaml.safe_load(front)
            errors = [] if isinstance(known, dict) and isinstance(known.get("tags"), list) else ["no metadata"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        found = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._send(400 if errors else 200, json.dumps(found).encode())

    def _info(self, repo: str, revision: str, blobs: bool) -> None:
        held = self._readable(repo)
        found = held.at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        sizes: dict[str, int | None] = {name: len(data) for name, data in found[1].items()} | held.listed
        siblings = [{"rfilename": name} | ({"size": size} if blobs else {}) for name, size in sizes.items()]
        self._send_json({"id": repo, "sha": found[0], "private": held.private, "siblings": siblings})

    def _preupload(self, held: Repository, sent: dict[str, Any]) -> None:
        answers = []
        for file in sent["files"]:
            if len(base64.b64decode(file["sample"], validate=True)) != min(file["size"], 512):
                raise Refused(400, message="the sample is not the file's beginning")
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self._send_json({"files": answers})

    def _batch(self, repo: str, sent: dict[str, Any]) -> None:
        self._writable(repo)
        if sent["operation"] != "upload" or "basic" not in sent["transfers"] or sent["hash_algo"] != "sha256":
            raise Refused(400, message="not an upload by LFS")
        objects = []
        for one in sent["objects"]:
            url = f"{self.hub.url}/upload/{one['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(one | ({} if one["oid"] in self.hub.large else {"actions": actions}))
        self._send_json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str) -> None:
        held = self._writable(repo)
        if self.headers.get("Content-Type") != "application/x-ndjson":
            raise Refused(400, message="a commit is NDJSON")
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refused(400, message="a commit begins with its summary")
        files = dict(held.at("main")[1])  # type: ignore[index]
        for line in lines:
            value = line["value"]
            if line["key"] == "file" and not value["path"].endswith(LARGE):
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "lfsFile" and len(self.hub.large.get(value["oid"], b"")) == value["size"]:
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refused(400, message=f"{line['key']} {value['path']}: not uploaded, or not there")
        digest = held.commit(files)
        url = f"{self.hub.url}/{repo}/commit/{digest}"
        self._send_json({"commitUrl": url, "commitOid": digest, "success": True})

    def _file(self, repo: str, revision: str, path: str) -> None:
        found = self._readable(repo).at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound")
        if path not in found[1]:
            raise Refused(404, "EntryNotFound")
        data = found[1][path]
        large = path.endswith(LARGE)
        etag = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large:
            self.hub.large[etag] = data
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # the real ones lie on another host
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            self._send(302, b"", headers | {"Location": f"{elsewhere}/large/{etag}"})
        else:
            self._send(200, data, headers)

    def _send_json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of loopback."""
    hub = Hub()
    handler = type("OneHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_the_client_at(url: str, monkeypatch: pytest.MonkeyPatch, home: Any) -> None:
    """Let huggingface_hub know this endpoint only: no telemetry, no cache or token elsewhere, loopback only."""
    from huggingface_hub import close_session, constants

    close_session()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's own protocol for large files has no stand-in
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.setattr(constants, name, str(home / name), raising=False)
    connect = socket.socket.connect

    def only_loopback(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)
