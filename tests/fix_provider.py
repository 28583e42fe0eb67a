"""A stand-in for a provider of embeddings on this machine, which answers what a test wants."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import SecretStr

from revector.embed import Embedder
from revector.settings import Settings

KEY = "sk-secret-0123456789"
Answer = tuple[int, dict[str, str], Any]


class Stand(ThreadingHTTPServer):
    """A provider whose model `NAME-16` embeds as `hash:16` does, and any other as `hash:8`, until `script` says otherwise."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.script: Callable[[dict[str, Any]], Answer | None] = lambda request: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def embedder(self, **options: Any) -> Embedder:
        settings = Settings(_env_file=None, openai_base_url=self.url, openai_api_key=SecretStr(KEY))
        return Embedder("openai:stand-in", settings=settings, **options)


class Handler(BaseHTTPRequestHandler):
    server: Stand

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers["authorization"])
        status, headers, body = self.server.script(request) or (200, {}, good(request))
        if not status:  # hang up
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(BrokenPipeError):  # a client that waits no longer
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def good(request: dict[str, Any]) -> dict[str, Any]:
    named = re.search(r"-(\d+)$", request.get("model", ""))
    dimension = request.get("dimensions") or (int(named[1]) if named else 8)
    vectors = Embedder(f"hash:{dimension}").encode(request["input"])
    tokens = sum(-(-len(text.encode()) // 4) for text in request["input"])
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(vectors.tolist())]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": "stand-in-2026", "data": data, "usage": usage}


def error(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    return status, headers, {"error": {"message": message, "type": "error", "code": code}}


@contextmanager
def standing() -> Iterator[Stand]:
    """The server, for as long as the block lasts."""
    server = Stand()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
