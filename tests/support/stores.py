"""A real S3 server (moto's) and a real web server on loopback, both with faults on demand."""

import contextlib
import itertools
import logging
import os
import threading
import time

from werkzeug.serving import make_server

from vlm_jax.data import remote

KINDS = ("503", "cut", "short", "long", "slow")


class Faults:
    """WSGI: every n-th ranged answer is a fault, one kind after the other.

    "cut": the connection ends within the body. "short", "long": the body has another length than was asked for, which
    its headers do not tell. "slow": it comes after `seconds`.
    """

    def __init__(self, app):
        self.app, self.lock = app, threading.Lock()
        self.reset()

    def reset(self, every=0, kinds=KINDS, seconds=0.0, down=False):
        self.every, self.kinds, self.seconds, self.down = every, itertools.cycle(kinds), seconds, down
        self.ranges, self.faults, self.paths = 0, 0, []

    def _kind(self, environ):
        with self.lock:
            if self.down:
                return "503"
            if "HTTP_RANGE" not in environ:
                return None
            self.ranges += 1
            self.paths.append(environ["PATH_INFO"])
            if not self.every or self.ranges % self.every:
                return None
            self.faults += 1
            return next(self.kinds)

    def __call__(self, environ, start_response):
        kind = self._kind(environ)
        if kind == "503":
            start_response("503 Slow Down", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return []
        if kind == "slow":
            time.sleep(self.seconds)
        if kind not in ("cut", "short", "long"):
            return self.app(environ, start_response)
        told = []
        body = b"".join(self.app(environ, lambda *arguments: told.extend(arguments)))
        status, headers = told[:2]
        if not status.startswith("206"):
            start_response(status, headers)
            return [body]
        cut = body[: len(body) // 2]
        sent = {"cut": cut, "short": cut, "long": body + b"more"}[kind]
        length = len(body) if kind == "cut" else len(sent)
        kept = [(name, value) for name, value in headers if name.lower() not in ("content-length", "content-range")]
        if kind == "cut":
            kept += [header for header in headers if header[0].lower() == "content-range"]
        start_response(status, [*kept, ("Content-Length", str(length))])
        return [sent]


class Folder:
    """WSGI: the files of a folder, in ranges; `whole` ignores ranges, `denied` refuses."""

    def __init__(self, folder):
        self.folder, self.whole, self.denied = folder, False, False

    def __call__(self, environ, start_response):
        path = f"{self.folder}{environ['PATH_INFO']}"
        if self.denied or not os.path.isfile(path):
            start_response("403 Forbidden" if self.denied else "404 Not Found", [("Content-Length", "0")])
            return []
        with open(path, "rb") as file:
            data = file.read()
        headers = [("ETag", f'"{os.stat(path).st_mtime_ns}"')]
        wanted = environ.get("HTTP_RANGE")
        if wanted and not self.whole:
            first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            if first >= len(data):
                start_response("416 Range Not Satisfiable", [("Content-Range", f"bytes */{len(data)}")])
                return []
            part = data[first : last + 1]
            headers += [("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")]
            start_response("206 Partial Content", [*headers, ("Content-Length", str(len(part)))])
            return [part]
        start_response("200 OK", [*headers, ("Content-Length", str(len(data)))])
        return [data]


@contextlib.contextmanager
def served(app):
    """Serves a WSGI app with faults; yields (Faults, its URL)."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    faults = Faults(app)
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield faults, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def s3_server():
    """Serves S3 with an empty bucket `bucket`; yields (Faults, its URL). Clients read the URL from the environment."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    with served(DomainDispatcherApplication(create_backend_app)) as (faults, url):
        names = {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "DEFAULT_REGION": "us-east-1", "ENDPOINT_URL": url}
        before = {f"AWS_{name}": os.environ.get(f"AWS_{name}") for name in names}
        os.environ.update({f"AWS_{name}": value for name, value in names.items()})
        remote.filesystem.cache_clear()  # of an earlier server
        remote.filesystem("s3", "s3://").mkdir("bucket")
        try:
            yield faults, url
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
