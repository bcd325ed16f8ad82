"""A stand-in of Google Cloud Storage on this machine, for the clients that our programs use on `gs://` paths.

It keeps objects in memory and speaks as much of the JSON API as TensorFlow's file system (through which `etils.epath`
goes) and TensorStore (through which Orbax goes) ask for. TensorStore can be told an address. TensorFlow cannot: it is
sent through a proxy, this server too, which answers in Google's place with a certificate of the test's own.
"""

import contextlib
import http.server
import json
import pathlib
import re
import ssl
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


class Bucket:
    """Objects by name: (generation, bytes). Every write of an object has a generation of its own.

    Attributes:
      objects: what is there.
      requests: method and path of what was asked.
      closed: objects whose names have this in them may not be written; "" for none.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.requests: list[str] = []
        self.closed = ""
        self.lock = threading.RLock()
        self._written = 0

    def put(self, name: str, data: bytes) -> int:
        """Writes an object; its generation."""
        with self.lock:
            self._written += 1
            self.objects[name] = (self._written, data)
            return self._written

    def names(self, below: str) -> list[str]:
        """The objects below a folder that are no folders themselves."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(below) and not name.endswith("/"))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # heads and bodies are written apart
    server: "_Server"

    def log_message(self, format: str, *args: object) -> None:
        pass

    # ------------------------------------------------------------------------------------------------------ answering

    def _answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200, **headers: object) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _refuse(self, status: int, message: str) -> None:
        self._json({"error": {"code": status, "message": message}}, status)

    def _metadata(self, name: str) -> dict[str, str]:
        generation, data = self.server.bucket.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2025-01-01T00:00:00.000Z",
            "timeCreated": "2025-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
        }

    # --------------------------------------------------------------------------------------------------------- asking

    def do_CONNECT(self) -> None:
        """Becomes the server that was asked for."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.request = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb", -1)
        self.wfile = self.connection.makefile("wb", 0)
        self.close_connection = False

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _serve(self) -> None:
        body = self._body()
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        bucket = self.server.bucket
        with bucket.lock:
            bucket.requests.append(f"{self.command} {self.path}")
            if url.path == "/storage/v1/b/bucket":
                self._json({"name": "bucket", "location": "US-EAST1"})
            elif url.path == "/storage/v1/b/bucket/storageLayout":
                self._json({"bucket": "bucket", "hierarchicalNamespace": {"enabled": False}})
            elif url.path.startswith("/upload/storage/v1/b/bucket/o"):
                self._upload(query, body)
            elif results := re.fullmatch(r"/storage/v1/b/bucket/o/([^/]+)/rewriteTo/b/bucket/o/([^/]+)", url.path):
                self._copy(*map(urllib.parse.unquote, results.groups()))
            elif url.path == "/storage/v1/b/bucket/o":
                self._list(query)
            elif results := re.fullmatch(r"/storage/v1/b/bucket/o/([^/]+)", url.path):
                self._object(urllib.parse.unquote(results.group(1)), query)
            elif url.path.startswith("/bucket/"):
                self._object(urllib.parse.unquote(url.path[len("/bucket/") :]), {"alt": "media"})
            else:
                self._refuse(404, f"no such bucket: {self.path}")

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        bucket, name = self.server.bucket, query["name"]
        if bucket.closed and bucket.closed in name:
            self._refuse(403, "the caller does not have storage.objects.create access to the object")
        elif not self._may(name, query):
            self._refuse(412, "the object is of another generation")
        elif query["uploadType"] == "resumable" and self.command == "POST":
            self._answer(200, Location=f"https://{HOSTS[0]}{self.path}")
        else:
            bucket.put(name, body)
            self._json(self._metadata(name))

    def _may(self, name: str, query: dict[str, str]) -> bool:
        generation = self.server.bucket.objects.get(name, (0, b""))[0]
        return "ifGenerationMatch" not in query or int(query["ifGenerationMatch"]) == generation

    def _copy(self, source: str, target: str) -> None:
        bucket = self.server.bucket
        if source not in bucket.objects:
            self._refuse(404, "no such object")
            return
        bucket.put(target, bucket.objects[source][1])
        self._json({"done": True, "resource": self._metadata(target)})

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for name in sorted(self.server.bucket.objects):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self._metadata(name))
        limit = int(query.get("maxResults", 1000))
        self._json({"items": items[:limit], "prefixes": sorted(prefixes)[:limit]})

    def _object(self, name: str, query: dict[str, str]) -> None:
        bucket = self.server.bucket
        if name not in bucket.objects:
            self._refuse(404, "no such object")
        elif not self._may(name, query):
            self._refuse(412, "the object is of another generation")
        elif self.command == "DELETE":
            del bucket.objects[name]
            self._answer(204)
        elif query.get("alt") != "media":
            self._json(self._metadata(name))
        elif query.get("ifGenerationNotMatch") == str(bucket.objects[name][0]):
            self._answer(304)
        else:
            self._send(*bucket.objects[name])

    def _send(self, generation: int, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        facts = {
            "x_goog_generation": generation,
            "x_goog_metageneration": 1,
            "Content_Type": "application/octet-stream",
        }
        if wanted is None:
            self._answer(200, data, **facts)
            return
        size, (low, high) = len(data), wanted.groups()
        first = int(low) if low else max(0, size - int(high))
        last = min(int(high), size - 1) if low and high else size - 1
        if first >= size:
            self._answer(416, Content_Range=f"bytes */{size}")
        else:
            self._answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{size}", **facts)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    bucket: Bucket
    tls: ssl.SSLContext

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serves an empty `gs://bucket`.

    Args:
      folder: gets the certificate, made with the program `openssl`.

    Yields:
      (what the bucket holds, environment variables that send the clients here)
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOSTS[0]}"]
    command += ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.bucket, server.tls = Bucket(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(certificate, key)
    threading.Thread(target=server.serve_forever, daemon=True, name="gcs").start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield (
            server.bucket,
            {
                "TENSORSTORE_GCS_HTTP_URL": address,
                "https_proxy": address,
                "CURL_CA_BUNDLE": str(certificate),
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                "no_proxy": "127.0.0.1,localhost",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
