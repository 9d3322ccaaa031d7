"""A bucket of Google Cloud Storage on this machine: a directory, seen in the two ways a run uses.

TensorStore reads and writes arrays over HTTP, so a server answers the part of the JSON API that it
needs, conditions on generations included. Everything else goes through etils.epath, which gets a
backend that maps `gs://` to the same directory.
"""

import contextlib
import functools
import http.server
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

from gcnet_jax import files


class DirectoryBackend(backend._OsPathBackend):
    """The operating system's own, below a directory. Like a bucket it has no empty directories."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _local(self, path: str) -> str:
        return os.path.join(self._root, os.fspath(path).removeprefix('gs://'))

    def open(self, path, mode):
        place = self._local(path)
        if 'r' not in mode:
            os.makedirs(os.path.dirname(place), exist_ok=True)
        return super().open(place, mode)

    def glob(self, path):
        return [f'gs://{os.path.relpath(p, self._root)}' for p in super().glob(self._local(path))]


def _one(name):
    def call(self, path, *arguments, **options):
        return getattr(super(DirectoryBackend, self), name)(
            self._local(path), *arguments, **options
        )

    return call


def _two(name):
    def call(self, path, target, *arguments, **options):
        places = self._local(path), self._local(target)
        return getattr(super(DirectoryBackend, self), name)(*places, *arguments, **options)

    return call


for _name in ('exists', 'isdir', 'listdir', 'makedirs', 'mkdir', 'rmtree', 'remove', 'stat'):
    setattr(DirectoryBackend, _name, _one(_name))
for _name in ('rename', 'replace', 'copy'):
    setattr(DirectoryBackend, _name, _two(_name))


class Handler(http.server.BaseHTTPRequestHandler):
    """Objects are files; a file's generation is the time of its last change."""

    protocol_version = 'HTTP/1.1'
    writing = threading.Lock()

    def __init__(self, root: Path, *arguments) -> None:
        self.root = root
        super().__init__(*arguments)

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self, code: int, body: bytes = b'', generation: int = 0) -> None:
        self.send_response(code)
        if generation:
            self.send_header('x-goog-generation', str(generation))
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _request(self) -> tuple[str, Path | None, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = url.path.partition('/b/')[2].split('/', 2)
        name = urllib.parse.unquote(parts[2]) if len(parts) > 2 else query.get('name')
        return parts[0], self.root / parts[0] / name if name else None, query

    def _refused(self, place: Path, query: dict[str, str]) -> bool:
        now = _generation(place)
        wanted, unwanted = query.get('ifGenerationMatch'), query.get('ifGenerationNotMatch')
        if wanted is not None and int(wanted) != now:
            self._answer(412)
        elif unwanted is not None and int(unwanted) == now:
            self._answer(304, generation=now)
        else:
            return False
        return True

    def do_GET(self) -> None:
        bucket, place, query = self._request()
        if place is None:
            self._list(self.root / bucket, query)
        elif not place.is_file():
            self._answer(404)
        elif not self._refused(place, query):
            with self.writing:
                body, generation = place.read_bytes(), _generation(place)
            asked = self.headers.get('Range')
            if asked:
                first, _, last = asked.removeprefix('bytes=').partition('-')
                total = len(body)
                begin = int(first) if first else total - int(last)
                end = min(int(last) + 1 if first and last else total, total)
                self.send_response(206)
                self.send_header('Content-Range', f'bytes {begin}-{end - 1}/{total}')
                self.send_header('x-goog-generation', str(generation))
                self.send_header('Content-Length', str(end - begin))
                self.end_headers()
                self.wfile.write(body[begin:end])
            else:
                self._answer(200, body, generation)

    def _list(self, bucket: Path, query: dict[str, str]) -> None:
        names = sorted(str(p.relative_to(bucket)) for p in bucket.rglob('*') if p.is_file())
        items = [
            {'name': name, 'size': str((bucket / name).stat().st_size)}
            for name in names
            if name.startswith(query.get('prefix', ''))
            and query.get('startOffset', '') <= name
            and not ('endOffset' in query and name >= query['endOffset'])
        ]
        self._answer(200, json.dumps({'items': items}).encode())

    def do_POST(self) -> None:
        _, place, query = self._request()
        body = self.rfile.read(int(self.headers['Content-Length']))
        with self.writing:
            if self._refused(place, query):
                return
            before = _generation(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(body)
            if _generation(place) == before:
                os.utime(place, ns=(before + 1, before + 1))
            generation = _generation(place)
        text = json.dumps({'name': query['name'], 'generation': str(generation)})
        self._answer(200, text.encode())

    def do_DELETE(self) -> None:
        _, place, query = self._request()
        with self.writing:
            if not place.is_file():
                self._answer(404)
            elif not self._refused(place, query):
                place.unlink()
                self._answer(204)


def _generation(place: Path) -> int:
    try:
        return place.stat().st_mtime_ns
    except OSError:
        return 0


@contextlib.contextmanager
def local_bucket(root: Path) -> Iterator[str]:
    """Serves a directory as buckets; yields the name of one, `gs://bucket`."""
    (root / 'bucket').mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(('localhost', 0), functools.partial(Handler, root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TENSORSTORE_GCS_HTTP_URL', f'http://localhost:{server.server_port}')
        patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
        patch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', DirectoryBackend(root))
        patch.setattr(gpath, '_is_tf_installed', lambda: False)
        patch.setattr(gcs_utils, 'is_hierarchical_namespace_enabled', lambda path: False)
        patch.setattr(files, '_can_import', lambda name: True)
        try:
            yield 'gs://bucket'
        finally:
            server.shutdown()
            server.server_close()
