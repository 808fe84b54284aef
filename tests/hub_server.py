"""A Hub of one's own on this machine: as much of the API of huggingface.co as reading a data set asks for.

`me/toy` is there; `me/gated` asks for consent; `me/private` wants the token `secret`; others are not there."""
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = 'c0ffee' * 6 + 'c0de'


class Hub(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.0'  # a connection for each question: none is left when the server ends
    folder, asked = None, []

    def log_message(self, *_): pass

    def say(self, status, data=b'', length=None, **headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(data) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data)

    def refuse(self, status, code, text):
        self.say(status, json.dumps(dict(error=text)).encode(), X_Error_Code=code, X_Error_Message=text)

    def entry(self, path):
        data = path.read_bytes()
        return dict(type='file', path=str(path.relative_to(self.folder)), size=len(data),
                    oid=hashlib.sha1(data).hexdigest())

    def files(self): return [path for path in sorted(self.folder.rglob('*')) if path.is_file()]

    def answer(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        words = unquote(self.path.split('?')[0]).strip('/').split('/')
        self.asked.append(f'{self.command} {self.path}')
        api = words[0] == 'api'
        if api: words = words[1:]
        if words[0] != 'datasets' or len(words) < 3: return self.say(404)
        name, what = '/'.join(words[1:3]), words[3:]
        if name == 'me/gated': return self.refuse(403, 'GatedRepo', 'Access to dataset me/gated is restricted')
        allowed = self.headers.get('Authorization') == 'Bearer secret'
        if name not in ('me/toy', 'me/private') or name == 'me/private' and not allowed:
            return self.refuse(401, 'RepoNotFound', 'Repository not found')
        if len(what) > 1 and what[1] not in ('main', COMMIT):
            return self.refuse(404, 'RevisionNotFound', 'Invalid rev id: ' + what[1])
        if api: return self.api(name, what, body)
        path = self.folder.joinpath(*what[2:])
        if not path.is_file(): return self.refuse(404, 'EntryNotFound', 'Entry not found')
        self.file(path)

    def api(self, name, what, body):
        if what[:1] == ['tree']:
            below = self.folder.joinpath(*what[2:])
            if not below.is_dir(): return self.refuse(404, 'EntryNotFound', 'Entry not found')
            told = [self.entry(path) for path in self.files() if path.is_relative_to(below)]
            folders = {path.parent for path in self.files()} - {self.folder, below}
            told += [dict(type='directory', path=str(path.relative_to(self.folder)), size=0, oid='0' * 40)
                     for path in sorted(folders) if path.is_relative_to(below)]
        elif what[:1] == ['paths-info']:
            wanted = json.loads(body)['paths'] if body[:1] == b'{' else [
                unquote(pair.split('=')[1]) for pair in body.decode().split('&') if pair.startswith('paths=')]
            told = [self.entry(self.folder/path) for path in wanted if (self.folder/path).is_file()]
        else:
            siblings = [dict(rfilename=str(path.relative_to(self.folder))) for path in self.files()]
            told = dict(id=name, sha=COMMIT, private=False, gated=False, disabled=False, downloads=0, likes=0,
                        tags=[], siblings=siblings)
        self.say(200, json.dumps(told).encode(), Content_Type='application/json')

    def file(self, path):
        data, span = path.read_bytes(), self.headers.get('Range')
        how = dict(X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(data).hexdigest()}"', Accept_Ranges='bytes')
        if not span: return self.say(200, data, **how)
        first, last = span.removeprefix('bytes=').split('-')
        first, last = (int(first), min(int(last or len(data) - 1), len(data) - 1)) if first else (
            max(len(data) - int(last), 0), len(data) - 1)
        self.say(206, data[first:last + 1], Content_Range=f'bytes {first}-{last}/{len(data)}', **how)

    do_GET = do_HEAD = do_POST = answer


@contextmanager
def served(folder):
    "Within it a Hub has the repository `folder`; yields its address and a list of all that it is asked."
    asked = []
    handler = type('Handler', (Hub,), dict(folder=Path(folder), asked=asked))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}', asked
    finally:
        server.shutdown()
        server.server_close()
