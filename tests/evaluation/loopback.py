"""A server on loopback that speaks the OpenAI protocol, streaming off, and fails on demand."""

import json
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-loopback-0123456789abcdef"


class Loopback:
    """Answers every question, and counts the questions by what they ask.

    Args:
        reply: (question, choice number) -> the answer's text. A question is the last message's
            content, or the prompt.
        fault: (question, how often it was asked before) -> None, or what goes wrong: a status,
            (status, headers, body), "hang", "reset", "garbled", "empty" or "error in 200".
        delay: seconds before each answer.
        choices: the most that one request gets, however many it asks for.
        with_usage: whether answers say what they cost.
    """

    def __init__(
        self,
        reply=lambda question, number: f"answer {number} to {question}",
        *,
        fault=lambda question, times: None,
        delay=0.0,
        choices=100,
        with_usage=True,
    ):
        self.reply, self.fault, self.delay, self.choices = reply, fault, delay, choices
        self.with_usage = with_usage
        self.asked, self.answered = Counter(), Counter()
        self.bodies, self.keys, self.paths, self.errors = [], set(), set(), []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self):
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                loopback.handle(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                import sys

                error = sys.exception()
                if not isinstance(error, ConnectionError):  # a client that was killed or gave up
                    loopback.errors.append(error)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        assert not self.errors, self.errors

    def handle(self, handler):
        length = int(handler.headers["Content-Length"])
        content = handler.rfile.read(length)
        if len(content) < length:
            raise ConnectionAbortedError("the client was killed in the middle of its question")
        body = json.loads(content)
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        with self.lock:
            times = self.asked[question]
            self.asked[question] += 1
            self.bodies.append(body)
            self.keys.add(handler.headers["Authorization"])
            self.paths.add(handler.path)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.delay)
            self.respond(handler, body, question, self.fault(question, times))
        finally:
            with self.lock:
                self.at_once -= 1

    def respond(self, handler, body, question, fault):
        if fault is None:
            # counted first: the client may be killed as soon as it has the answer
            with self.lock:
                self.answered[question] += 1
            send(handler, 200, json.dumps(self.completion(body, question)))
        elif fault == "hang":
            self.closing.wait(5)
            handler.close_connection = True
        elif fault == "reset":
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            handler.connection.close()
            handler.close_connection = True
        elif fault == "garbled":
            send(handler, 200, '{"choices": [{"message": {"content": "half an ans')
        elif fault == "empty":
            send(handler, 200, json.dumps({"id": "x", "choices": []}))
        elif fault == "error in 200":
            send(handler, 200, json.dumps({"error": {"message": "the upstream is down"}}))
        else:
            status, headers, text = (fault, {}, None) if isinstance(fault, int) else fault
            error = {"error": {"message": text or f"injected {status}", "type": "injected"}}
            send(handler, status, json.dumps(error), headers)

    def completion(self, body, question):
        num = min(body.get("n", 1), self.choices)
        texts = [self.reply(question, body.get("seed", 0) + number) for number in range(num)]
        is_chat = "messages" in body
        choices = [
            {"index": index, "finish_reason": "stop", "logprobs": None}
            | ({"message": {"role": "assistant", "content": t}} if is_chat else {"text": t})
            for index, t in enumerate(texts)
        ]
        answer = {
            "id": "loopback",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": 0,
            "model": body["model"],
            "choices": choices,
        }
        words_in, words_out = len(str(question).split()), sum(len(t.split()) for t in texts)
        if self.with_usage:
            answer["usage"] = {
                "prompt_tokens": words_in,
                "completion_tokens": words_out,
                "total_tokens": words_in + words_out,
            }
        return answer


def send(handler, status, text, headers=None):
    content = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def first_times(fault, num):
    """The fault for the first `num` times that a question is asked."""
    return lambda question, times: fault if times < num else None


def wait_until(condition, seconds=120.0):
    """Wait for another thread or process."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def run_and_kill(command, server, *, answers):
    """Run a command that asks the server, kill it after that many answers; how many it got."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: server.answered.total() >= answers)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: server.at_once == 0)
    return server.answered.total()
