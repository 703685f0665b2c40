"""A Hugging Face hub in small: serves the repositories below a directory, and notes each request in a file.

Run with the directory, which holds OWNER/NAME/FILE, and the file; prints its port. Each repository has one commit.
Files ending in .safetensors are kept with Git LFS, as on the hub, so that their SHA-256 is listed. A file named GATED
closes a repository. What is pushed is taken, by one commit of files that are sent along with it.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT, LOG = Path(sys.argv[1]), Path(sys.argv[2])


def commit_of(repository):
    return hashlib.sha1(str(repository.relative_to(ROOT)).encode()).hexdigest()


def describe(path):
    content = path.read_bytes()
    entry = {"rfilename": path.name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if path.suffix == ".safetensors":
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with LOG.open("a") as log:
            log.write(f"{self.command} {self.path.partition('?')[0]}\n")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "models"]:
            found = [{"id": "/".join(path.parts[-2:]), "tags": ["corolla"]} for path in sorted(ROOT.glob("*/*"))]
            return self.reply(200, {}, json.dumps(found).encode())
        if parts[:2] == ["api", "models"]:
            return self.answer_listing(ROOT / parts[2] / parts[3], parts[5])
        return self.answer_file(ROOT / parts[0] / parts[1], parts[4])

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            said = json.loads(body)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            (ROOT / name).mkdir(parents=True, exist_ok=True)
            return self.reply(200, {}, json.dumps({"url": f"http://127.0.0.1/{name}", "id": name}).encode())
        if parts == ["api", "validate-yaml"]:
            return self.reply(200, {}, b'{"errors": [], "warnings": []}')
        repository = ROOT / parts[2] / parts[3]
        if parts[4] == "preupload":
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.reply(200, {}, json.dumps({"files": modes}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                (repository / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
        made = {"commitUrl": f"http://127.0.0.1/{parts[2]}/{parts[3]}/commit/x", "commitOid": commit_of(repository)}
        return self.reply(200, {}, json.dumps(made | {"success": True}).encode())

    def answer_listing(self, repository, revision):
        if not repository.is_dir():
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        if (repository / "GATED").exists():
            return self.reply(403, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", commit_of(repository)):
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        files = [describe(path) for path in sorted(repository.iterdir())]
        listing = {"id": "/".join(repository.parts[-2:]), "sha": commit_of(repository), "siblings": files}
        return self.reply(200, {}, json.dumps(listing).encode())

    def answer_file(self, repository, name):
        content = (repository / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(repository)}
        if "Range" not in self.headers:
            return self.reply(200, headers, content)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        return self.reply(206, headers | {"Content-Range": f"bytes {first}-*/{len(content)}"}, part)

    def reply(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
