"""A chat-completions server of the tests' own, on the loopback address."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def completion(text, finish_reason):
    """The body of a successful reply, as OpenAI writes it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish_reason,
            }
        ],
    }


class Exchange(BaseHTTPRequestHandler):
    """One request; the test's `answer` function says what comes back."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        length = int(self.headers["content-length"])
        self.body = json.loads(self.rfile.read(length))
        # A connection has one handler for all its requests, so this one will be written over.
        asked = SimpleNamespace(path=self.path, headers=self.headers, body=self.body)
        with self.server.lock:
            self.server.exchanges.append(asked)
            self.number = len(self.server.exchanges)
        try:
            self.server.answer(self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as some tests want it to

    def send(self, status, body, content_type="application/json", **headers):
        payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(payload)

    def say(self, text, finish_reason="stop"):
        self.send(200, completion(text, finish_reason))

    def fail(self, status, message, **error):
        # The header keeps the client's pause before a retry at a millisecond.
        self.send(status, {"error": {"message": message, **error}}, retry_after_ms="1")

    def log_message(self, *arguments):
        pass


class JudgeServer(ThreadingHTTPServer):
    """Records all exchanges; `over` is set when the test has ended, and lets hanging replies go."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Exchange)
        self.answer = lambda exchange: exchange.say("Score: 4")
        self.exchanges = []
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def judge_server(monkeypatch):
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()
