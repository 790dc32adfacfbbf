"""A stand-in for the Hugging Face Hub on the loopback, that serves real bytes and misbehaves as a test tells it to.

    hub = FakeHub()
    hub.add("model", "owner/name", {"config.json": b"{}", "model.safetensors": weights})
    hub.fault("/resolve/", status=503, times=2)
    ... hub.url, hub.log ...
    hub.stop()

Files of 64 kB and more are "large": listed with their sha256 and served, as on the Hub, from another host after a redirect.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # ours: a test may replace time.sleep
from urllib.parse import unquote, urlsplit

LARGE = 64_000
TOKEN = "hf_right"


class FakeHub:
    """`log` holds one (path, headers) per request; `url` is what HF_ENDPOINT has to be."""

    def __init__(self):
        self.repos, self.storage, self.faults, self.log = {}, {}, [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, kind, repo_id, files, commit=None, gated=False):
        """Publish a repository with one commit, on the branch main; returns the commit's id."""
        entries = []
        for path, data in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": path, "size": len(data), "blobId": blob}
            if len(data) >= LARGE:
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
                self.storage[sha256] = data
            entries.append(entry)
        commit = commit or hashlib.sha1(json.dumps(entries).encode()).hexdigest()
        info = {"id": repo_id, "sha": commit, "tags": ["license:apache-2.0"], "siblings": entries}
        self.repos[f"{kind}s", repo_id] = {"files": dict(files), "info": info, "gated": gated}
        return commit

    def fault(self, where, times=10**9, **action):
        """Misbehave on the next `times` requests whose path matches the regex `where`. Actions, one or more:

        status=503 (with headers={...}, body=b"..."); stall=seconds before the answer; cut=n: n bytes of the body, then FIN, or with
        rst=True a reset, with hang=seconds silence; corrupt=True: one byte flipped.
        """
        self.faults.append({"where": where, "times": times, **action})

    def asked(self, where):
        """The logged requests whose path matches the regex."""
        return [entry for entry in self.log if re.search(where, entry[0])]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((path, self.headers))
        faults = [one for one in self.hub.faults if one["times"] > 0 and re.search(one["where"], path)]
        self.act = faults[0] if faults else {"times": 1}
        self.act["times"] -= 1
        try:
            sleep(self.act.get("stall", 0))
            if "status" in self.act:
                self.answer(self.act["status"], self.act.get("body", b""), self.act.get("headers", {}))
            elif stored := re.fullmatch(r"/storage/(\w+)", path):
                self.send_file(self.hub.storage[stored[1]])
            else:
                self.route(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def route(self, path):
        api = re.fullmatch(r"/(api)/(models|datasets)/([^/]+/[^/]+)/revision/([^/]+)()", path)
        found = api or re.fullmatch(r"()/(datasets|)/?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        _, kind, repo_id, revision, name = found.groups()
        token, repo = self.headers.get("Authorization"), self.hub.repos.get((kind or "models", repo_id))
        if token not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo is None:  # as the Hub answers: a guest is not told what exists
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if revision not in ("main", repo["info"]["sha"]):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self.answer(200, json.dumps(repo["info"]).encode(), {})
        if repo["gated"] and not token:
            return self.refuse(401, "GatedRepo", "Access is restricted")
        data = repo["files"][name]
        if len(data) >= LARGE:
            place = f"http://localhost:{self.hub.port}/storage/{hashlib.sha256(data).hexdigest()}"
            return self.answer(302, b"", {"Location": place})
        self.send_file(data)

    def send_file(self, data):
        if self.act.get("corrupt"):
            data = bytes([data[0] ^ 1]) + data[1:]
        start, status, headers = 0, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = len(data) - start
        self.close_connection = "cut" in self.act
        self.answer(status, data[start:][: self.act.get("cut")], headers)
        if self.close_connection:  # let the client read what was sent
            sleep(self.act.get("hang", 0.1 if self.act.get("rst") else 0))
        if self.act.get("rst"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
