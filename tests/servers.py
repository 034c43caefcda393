"""Servers for tests: an OpenAI-compatible endpoint that misbehaves on purpose (the model's name says how), and the real
vLLM."""

import hashlib
import json
import math
import random
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "429 with Retry-After", "500", "drop", "malformed", "empty logprobs", "no choices")


def score_of(prompt: str) -> int:
    """What this judge thinks of a prompt."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 101


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512

    def __init__(self, latency=0.0, share=0.0, seed=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.latency, self.share, self.random, self.lock = latency, share, random.Random(seed), threading.Lock()
        self.text = None  # say this instead of a score
        self.requests, self.prompts, self.at, self.active, self.most_active = [], [], [], 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):
        pass  # clients that go away are part of the game


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        s, ask = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.requests.append(ask)
            s.at.append(time.monotonic())
            s.active += 1
            s.most_active = max(s.most_active, s.active)
            first = s.prompts.count(ask["messages"][0]["content"]) == 0
            s.prompts.append(ask["messages"][0]["content"])
            fault = s.random.choice(FAULTS) if s.random.random() < s.share else ""
        try:
            time.sleep(s.latency)
            self.answer(ask, fault, first)
        finally:
            with s.lock:
                s.active -= 1

    def answer(self, ask, fault, first):
        model = ask["model"]
        if model.startswith("once "):  # fails the first time a prompt is seen
            fault = model.removeprefix("once ") if first else ""
        if self.headers["Authorization"] != "Bearer sk-right" and model == "locked":
            return self.reply(
                401, {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization'][7:]}"}}
            )
        if model == "unknown":
            return self.reply(404, {"error": {"message": "The model does not exist"}})
        if model == "reasoner" and ask.get("logprobs"):
            return self.reply(
                400, {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model."}}
            )
        if fault == "drop" or model == "drop":
            self.close_connection = True
            return self.connection.close()
        if fault == "429" or model == "429":
            return self.reply(429, {"error": {"message": "slow down"}})
        if fault == "429 with Retry-After":
            return self.reply(429, {"error": {"message": "slow down"}}, Retry_After=1)
        if fault == "500":
            return self.reply(500, {"error": {"message": "oops"}})
        if fault == "malformed" or model == "malformed":
            return self.reply(200, b'{"choices": [{"mess')
        if fault == "html" or model == "html":
            return self.reply(200, b"<html>hello</html>", Content_Type="text/html")
        if fault == "no choices":
            return self.reply(
                200, {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": []}
            )
        if model == "slow":
            time.sleep(5)
        prompt = ask["messages"][0]["content"]
        n = score_of(prompt)
        if model == "refuser":
            tokens = {"REF": 0.9, "50": 0.1}
        else:
            tokens = {str(n): 0.75, str(n + 1 if n == 0 else n - 1): 0.1, "I": 0.05}
        text = f"Thinking... so <answer>{'YES' if n >= 50 else 'NO'}</answer>" if "<answer>YES" in prompt else str(n)
        text = self.server.text or text
        logprobs = {
            "content": [
                {
                    "token": str(n),
                    "logprob": -0.3,
                    "bytes": None,
                    "top_logprobs": [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in tokens.items()],
                }
            ]
        }
        if fault == "empty logprobs" or model == "empty":
            logprobs = {"content": []}
        if not ask.get("logprobs") or model == "textual":
            logprobs = None
        self.reply(
            200,
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": model,
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": text},
                        "logprobs": logprobs,
                    }
                ],
            },
        )


@contextmanager
def serving(**kw):
    server = Server(**kw)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def start_vllm(command: list[str], log) -> tuple:  # the process, http://host:port
    """Start a server of vLLM's on a free port and wait till it answers; what it says goes into `log`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(log, "w") as out:
        asked = [*command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(asked, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return process, url
        except OSError:
            time.sleep(0.5)
    process.kill()
    raise TimeoutError(log.read_text()[-3000:])
