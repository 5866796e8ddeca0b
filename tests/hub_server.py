"""A small Hub on this machine: the part of its API that `huggingface_hub` uses to publish and to load a model.

Repositories are kept in memory: commits, each with its files, and branches. Large files go by Git LFS, in one piece or in
several; from Xet, the protocol that the Hub prefers, the client has to be kept by HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 10_000  # bytes from which a file goes by LFS; weights always do
PART = 50_000  # bytes from which it goes in several pieces


class HubError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **further: str):
        super().__init__(message)
        self.content = {"error": message, **further}
        self.status, self.headers = status, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """`branches` has the id of the last commit of each, `commits` all of them by id."""

    is_private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        parent = self.branches.get(branch)
        content = repr((len(self.commits), parent, message, sorted(files)))
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, message, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    @property
    def main(self) -> Commit:
        return self.at("main")


class HubServer:
    """Serves as long as it is open.

    Attributes:
        writers: token -> namespaces that it may write to. url: for HF_ENDPOINT. repositories: by `org/name`.
        failures: (method and path as a pattern, answer): the first that fits a request is used up and answers in its place.
            The answer is a status, or where the connection breaks off: `"request"`, in the middle of it, or `"answer"`,
            in the middle of that, when all is done.
        requests: "METHOD path" of all requests so far. spoilt: small files that come back with another last byte.
        ranges: those that were asked for.
    """

    def __init__(self, writers: dict[str, set[str]]):
        self.writers, self.repositories, self.blobs = writers, {}, {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.failures: list[tuple[str, int | str]] = []
        self.requests: list[str] = []
        self.spoilt: set[str] = set()
        self.ranges: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        length = int(self.headers.get("Content-Length") or 0)
        failure = next((entry for entry in self.hub.failures if re.search(entry[0], line)), None)
        self.close_connection = breaks_off = failure is not None and isinstance(failure[1], str)
        self.sends_half = failure is not None and failure[1] == "answer"
        if failure:
            self.hub.failures.remove(failure)
        if breaks_off and not self.sends_half:
            self.rfile.read(length // 2)
            return
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self.chunks())
        try:
            if failure and not breaks_off:
                return self.send(failure[1], b"<html>not the Hub, but a gateway before it</html>")
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, line):
                    return method(self, *map(unquote, match.groups()))
            raise HubError(404, f"no such page: {line}")
        except HubError as error:
            self.send(error.status, error.content, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.sends_half else content)

    # ---------------------------------------------------------------------------------------------------------- rights

    @property
    def namespaces(self) -> set[str]:
        """Those that may be written to; without a token none, and a token that has expired is refused even for reading."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.writers:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.writers.get(token, set())

    def readable(self, repo_id: str) -> Repository:
        namespaces, repository = self.namespaces, self.hub.repositories.get(repo_id)
        if repository is None or (repository.is_private and repo_id.split("/")[0] not in namespaces):
            raise HubError(404 if namespaces else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        self.check_namespace(repo_id.split("/")[0])
        return repository

    def check_namespace(self, namespace: str) -> None:
        if not self.namespaces:
            raise HubError(401, "Invalid username or password.")
        if namespace not in self.namespaces:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')

    # --------------------------------------------------------------------------------------------------------- writing

    def create_repository(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        self.check_namespace(wanted["organization"])
        if repo_id in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        self.hub.repositories[repo_id] = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.send(200, {"url": f"{self.hub.url}/{repo_id}", "id": repo_id})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self.writable(repo_id)
        if branch in repository.branches:
            raise HubError(409, "Reference already exists")
        repository.branches[branch] = repository.main.oid
        self.send(200, {})

    def validate_card(self) -> None:
        """As strict as YAML is, and in the metadata that a widget needs."""
        content = json.loads(self.body)["content"]
        try:
            metadata = yaml.safe_load(content.split("---")[1])
            for example in metadata.get("widget", []):
                assert {*example} == {"src", "example_title", "candidate_labels"}, f"widget: {example}"
        except (yaml.YAMLError, AssertionError, IndexError) as error:
            return self.send(400, {"errors": [{"message": str(error)}], "warnings": []})
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        present, wanted = self.writable(repo_id).at(revision).files, json.loads(self.body)["files"]
        files = []
        for file in wanted:
            path, is_large = file["path"], _is_large(file["path"], file["size"])
            oid = _oid(path, present[path]) if path in present else None
            mode = "lfs" if is_large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        self.writable(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size, actions = wanted["oid"], wanted["size"], {}
            url = f"{self.hub.url}/lfs/{oid}"
            if oid not in self.hub.blobs:
                upload = {"href": url}
                if size > PART:
                    parts = {f"{number + 1:05}": f"{url}/{number + 1}" for number in range(-(-size // PART))}
                    upload = {"href": f"{url}/complete", "header": {"chunk_size": str(PART), **parts}}
                actions = {"actions": {"upload": upload, "verify": {"href": f"{url}/verify"}}}
            objects.append({"oid": oid, "size": size, **actions})
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        self.keep(oid, self.body)

    def lfs_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = json.loads(self.body)["parts"]
        self.keep(oid, b"".join(self.hub.parts.pop((oid, part["partNumber"])) for part in parts))

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the content has another hash")
        self.hub.blobs[oid] = content
        self.send(200)

    def lfs_verify(self, oid: str) -> None:
        if len(self.hub.blobs.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, "no such object")
        self.send(200)

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        before, entries = repository.at(revision), [json.loads(line) for line in self.body.splitlines()]
        header, files = entries[0]["value"], dict(before.files)
        if header.get("parentCommit", before.oid) != before.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for entry in entries[1:]:
            kind, value = entry["key"], entry["value"]
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] not in self.hub.blobs:
                raise HubError(400, f"{value['path']} was not uploaded")
            else:
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = repository.commit(revision, header["summary"], files)
        self.send(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid})

    # --------------------------------------------------------------------------------------------------------- reading

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repository = self.readable(repo_id)
        commit = repository.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send(200, {"id": repo_id, "sha": commit.oid, "private": repository.is_private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        files = self.readable(repo_id).at(revision).files
        found = [_tree_entry(path, content) for path, content in sorted(files.items()) if path.startswith(folder)]
        if folder and not found:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        self.send(200, found)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.readable(repo_id).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content, oid = commit.files[path], _oid(path, commit.files[path])
        if _is_large(path, len(content)):
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            other_host = self.hub.url.replace("127.0.0.1", "localhost")  # to which a client must not send its token
            return self.send(302, b"", headers | {"Location": f"{other_host}/cdn/{oid}"})
        content = content[:-1] + b"?" if path in self.hub.spoilt else content
        self.send_content(content, headers | {"ETag": f'"{oid}"'})

    def large_file(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "only one of the two ways to authenticate is allowed")
        self.send_content(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            return self.send(200, content, headers)
        self.hub.ranges.append(start[0])
        told = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
        self.send(206, content[int(start[1]) :], headers | {"Content-Range": told})

    def whoami(self) -> None:
        if not self.namespaces:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.send(200, {"type": "user", "name": sorted(self.namespaces)[0]})


NAME, ONE = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES = (
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create_repository),
    ("POST /api/validate-yaml", _Handler.validate_card),
    (f"POST /api/models/{NAME}/branch/{ONE}", _Handler.create_branch),
    (f"POST /api/models/{NAME}/preupload/{ONE}", _Handler.preupload),
    (f"POST /api/models/{NAME}/commit/{ONE}", _Handler.commit),
    (f"POST /{NAME}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT /lfs/(\\w+)", _Handler.lfs_upload),
    ("PUT /lfs/(\\w+)/(\\d+)", _Handler.lfs_part),
    ("POST /lfs/(\\w+)/complete", _Handler.lfs_complete),
    ("POST /lfs/(\\w+)/verify", _Handler.lfs_verify),
    (f"GET /api/models/{NAME}", _Handler.model_info),
    (f"GET /api/models/{NAME}/revision/{ONE}", _Handler.model_info),
    (f"GET /api/models/{NAME}/tree/{ONE}", _Handler.tree),
    (f"GET /api/models/{NAME}/tree/{ONE}/(.+)", _Handler.tree),
    (f"(?:GET|HEAD) /{NAME}/resolve/{ONE}/(.+)", _Handler.resolve),
    ("(?:GET|HEAD) /cdn/(\\w+)", _Handler.large_file),
)


def _is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LARGE


def _oid(path: str, content: bytes) -> str:
    """As the Hub names a file: SHA-256 of a large one, of the others the id that Git gives to the blob."""
    if _is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if _is_large(path, len(content)):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
    return entry
