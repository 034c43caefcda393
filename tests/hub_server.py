"""A model hub for tests: the few calls of the Hub's HTTP interface that a push and a pull need, over a real socket."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_RightTokenOfTheseTests0123456789"


class Repo:
    """Branches, each a list of commits; a commit is the files of the repository: name -> content."""

    def __init__(self, private=False):
        self.private, self.branches = private, {"main": [{".gitattributes": b""}]}

    def sha(self, branch):
        files = sorted((k, hashlib.sha256(v).hexdigest()) for k, v in self.branches[branch][-1].items())
        return hashlib.sha1(repr((files, len(self.branches[branch]))).encode()).hexdigest()

    def files(self, revision) -> dict | None:
        for branch, commits in self.branches.items():
            if revision in (branch, self.sha(branch)):
                return commits[-1]
        return None


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.large, self.lock = {}, {}, threading.Lock()
        self.requests = []  # (method, path)
        self.received = []  # bodies
        self.faults = {}  # part of a path -> status
        self.meanwhile = None  # called while a push is under way: what somebody else does

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set:
        """Names of the files that were downloaded."""
        return {path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path}

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code="", message=""):
        """An error whose text repeats what was sent, as servers do."""
        told = {"error": f"{message} {self.headers['Authorization']}"}
        self.reply(status, told, **{k: v for k, v in (("X_Error_Code", code), ("X_Error_Message", message)) if v})

    def handle_one(self):
        s, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with s.lock:
            s.requests.append((self.command, path))
            s.received.append(body)
            fault = next((status for part, status in s.faults.items() if part in path), 0)
            if fault:
                return self.fail(fault, message="Invalid credentials in Authorization header" if fault == 401 else "")
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    return answer(self, *found.groups(), body)
        self.fail(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def may(self, write=False) -> bool:
        given = self.headers["Authorization"]
        if given not in (None, f"Bearer {TOKEN}") or (write and not given):
            self.fail(401, message="Invalid credentials in Authorization header")
            return False
        return True

    def repo(self, name, write=False) -> Repo | None:
        """A repository that this request may see; else the request is answered."""
        if not self.may(write):
            return None
        found = self.server.repos.get(name)
        if found is None or (found.private and not self.headers["Authorization"]):
            self.fail(404 if found is None else 401, "RepoNotFound")
            return None
        return found

    def create(self, body):
        if not self.may(write=True):
            return
        ask = json.loads(body)
        name = f"{ask['organization']}/{ask['name']}"
        told = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return self.reply(409, told)
        self.server.repos[name] = Repo(ask.get("visibility") == "private")
        self.reply(200, told)

    def branch(self, name, branch, body):
        if repo := self.repo(name, write=True):
            new = branch not in repo.branches
            repo.branches.setdefault(branch, [dict(repo.branches["main"][-1])])
            self.reply(200 if new else 409, {})

    def info(self, name, revision, body):
        revision = revision or "main"
        if not (repo := self.repo(name)):
            return
        files = repo.files(revision)
        if files is None:
            return self.fail(404, "RevisionNotFound")
        sha = repo.sha(revision) if revision in repo.branches else revision
        siblings = [{"rfilename": f} for f in files]
        self.reply(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name, revision, body):
        if repo := self.repo(name):
            files = repo.files(revision)
            self.reply(200, [{"type": "file", "path": f, "size": len(c), "oid": git_oid(c)} for f, c in files.items()])

    def validate(self, body):
        if self.server.meanwhile:
            self.server.meanwhile()
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        ok = isinstance(head, dict) and "licence" not in str(head.get("license", ""))
        self.reply(200 if ok else 400, {"errors": [] if ok else [{"message": "license: not one of the known"}]})

    def preupload(self, name, branch, body):
        if not (repo := self.repo(name, write=True)):
            return
        there, out = repo.branches[branch][-1], []
        for f in json.loads(body)["files"]:
            mode = "lfs" if f["path"].endswith(".pt") else "regular"
            oid = git_oid(there[f["path"]]) if f["path"] in there and mode == "regular" else None
            out.append({"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": out})

    def batch(self, name, body):
        if not self.repo(name, write=True):
            return
        out = []
        for o in json.loads(body)["objects"]:
            there = o["oid"] in self.server.large
            actions = {} if there else {"actions": {"upload": {"href": f"{self.server.url}/large/{o['oid']}"}}}
            out.append({"oid": o["oid"], "size": o["size"], **actions})
        self.reply(200, {"transfer": "basic", "objects": out})

    def large(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.reply(200)

    def commit(self, name, branch, body):
        if not (repo := self.repo(name, write=True)):
            return
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, repo.sha(branch)):
            return self.fail(412)
        files = dict(repo.branches[branch][-1])
        for line in lines[1:]:
            v = line["value"]
            content = base64.b64decode(v["content"]) if line["key"] == "file" else self.server.large[v["oid"]]
            files[v["path"]] = content
        repo.branches[branch].append(files)
        sha = repo.sha(branch)
        self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name, revision, file, body):
        if not (repo := self.repo(name)):
            return
        files = repo.files(revision) or {}
        if file not in files:
            return self.fail(404, "EntryNotFound")
        etag = f'"{git_oid(files[file])}"'
        self.reply(200, files[file], ETag=etag, X_Repo_Commit=revision)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/(.+)", Handler.large),
    ("GET", f"/api/models/{NAME}/tree/(.+)", Handler.tree),
    ("GET", f"/api/models/{NAME}(?:/revision/(.+))?", Handler.info),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def hub_serving():
    server = HubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
