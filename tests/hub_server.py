"""A local hub: the HTTP routes of a model hub that its client uses, with the plain LFS route, on files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Repositories, commits and large files.

    Attributes:
        repos: name -> list of (commit, {path: (blob id, is large)}).
        blobs: id -> bytes; large files by sha256, others by git's own id.
        log: (method, path, Range header) of every request.
        fail: how many of the next downloads are cut off in the middle.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Routes)
        self.repos, self.blobs, self.log, self.fail, self.refuse = {}, {}, [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repo: str, revision: str):
        commits = self.repos.get(repo)
        if not commits:
            return None
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)


class Routes(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep the test's output quiet."""

    def answer(self, status: int, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
        for key, value in {"Content-Length": len(data), **kind, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.log.append((self.command, path, self.headers.get("Range")))
        data = self.body()
        for method, pattern, route in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return route(self, data, *found.groups())
        return self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


def create(self, data):
    wanted = json.loads(data)
    name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
    if name in self.server.repos:
        return self.answer(409, {"url": f"{self.server.url}/{name}"})
    self.server.repos[name] = []
    return self.answer(200, {"url": f"{self.server.url}/{name}"})


def validate(self, data):
    import yaml

    card = yaml.safe_load(json.loads(data)["content"].split("---")[1])
    wrong = [] if isinstance(card.get("tags"), list) else [{"message": "tags are no list"}]
    return self.answer(400 if wrong else 200, {"errors": wrong, "warnings": []})


def preupload(self, data, repo, revision):
    files = json.loads(data)["files"]
    modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
              "shouldIgnore": False} for f in files]  # fmt: skip
    return self.answer(200, {"files": modes})


def batch(self, data, repo):
    objects = []
    for wanted in json.loads(data)["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.server.blobs:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
        objects.append(entry)
    return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")


def store_large(self, data, oid):
    if self.server.refuse:
        self.server.refuse -= 1
        return self.answer(403, {"error": "refused"})
    if hashlib.sha256(data).hexdigest() != oid:
        return self.answer(400, {"error": "the bytes are not those announced"})
    self.server.blobs[oid] = data
    return self.answer(200)


def commit(self, data, repo, revision):
    commits = self.server.repos[repo]
    files = dict(commits[-1][1]) if commits else {}
    for line in data.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            content = base64.b64decode(value["content"])
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.server.blobs[oid] = content
            files[value["path"]] = (oid, False)
        elif entry["key"] == "lfsFile":
            assert value["oid"] in self.server.blobs, "a commit names a file that was not uploaded"
            files[value["path"]] = (value["oid"], True)
    sha = hashlib.sha1(data + str(len(commits)).encode()).hexdigest()
    commits.append((sha, files))
    url = f"{self.server.url}/{repo}/commit/{sha}"
    return self.answer(200, {"commitUrl": url, "commitOid": sha, "success": True})


def info(self, data, repo, revision="main"):
    found = self.server.commit(repo, revision)
    if found is None:
        kind = "RevisionNotFound" if self.server.repos.get(repo) else "RepoNotFound"
        return self.answer(404, {"error": "not found"}, X_Error_Code=kind)
    return self.answer(
        200, {"id": repo, "modelId": repo, "sha": found[0], "siblings": [{"rfilename": p} for p in sorted(found[1])],
              "private": False, "tags": [], "downloads": 0, "likes": 0}
    )  # fmt: skip


def tree(self, data, repo, revision):
    found = self.server.commit(repo, revision)
    if found is None:
        return self.answer(404, {"error": "not found"}, X_Error_Code="RevisionNotFound")
    rows = []
    for path, (oid, large) in sorted(found[1].items()):
        size = len(self.server.blobs[oid])
        extra = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if large else {}
        rows.append({"type": "file", "path": path, "oid": oid, "size": size, **extra})
    return self.answer(200, rows)


def resolve(self, data, repo, revision, path):
    found = self.server.commit(repo, revision)
    if found is None or path not in found[1]:
        kind = "EntryNotFound" if found else "RevisionNotFound"
        return self.answer(404, {"error": "not found"}, X_Error_Code=kind)
    oid, large = found[1][path]
    content = self.server.blobs[oid]
    headers = {"X_Repo_Commit": found[0], "ETag": f'"{oid}"', "Accept_Ranges": "bytes"}
    if large:
        headers |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(content)}
    asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
    if asked:
        start = int(asked[1])
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(206, content[start:], **headers)
    if large and self.command == "GET" and self.server.fail:
        self.server.fail -= 1
        self.send_response(200)
        for key, value in {
            "Content-Length": len(content),
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True
        return None
    return self.answer(200, content, **headers)


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", create),
    (("POST",), r"/api/validate-yaml", validate),
    (("POST",), rf"/api/models/{REPO}/preupload/([\w.-]+)", preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", store_large),
    (("POST",), rf"/api/models/{REPO}/commit/([\w.-]+)", commit),
    (("GET",), rf"/api/models/{REPO}/revision/([\w.-]+)", info),
    (("GET",), rf"/api/models/{REPO}/tree/([\w.-]+)", tree),
    (("GET",), rf"/api/models/{REPO}", info),
    (("GET", "HEAD"), rf"/{REPO}/resolve/([\w.-]+)/(.+)", resolve),
]
