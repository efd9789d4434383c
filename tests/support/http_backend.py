"""A real HTTP server on loopback that answers chat completions by script."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish="stop", **message):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text, **message}, "finish_reason": finish}]})


class Backend:
    """Answers each prompt by a script of its own: a list of replies, of which the last is repeated.

    What has no script gets the text that `default` makes of the prompt: by default the prompt in capitals.
    """

    def __init__(self, default=str.upper):
        self.default = default
        self.scripts, self.asked, self.bodies, self.headers, self.times = {}, Counter(), [], [], []
        self.under_way, self.most_under_way = 0, 0
        self.lock = threading.Lock()
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                backend.handle(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.lock:
            script = self.scripts.get(prompt, [completion(self.default(prompt))])
            reply = script[min(self.asked[prompt], len(script) - 1)]
            self.asked[prompt] += 1
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if callable(reply):
                reply = reply(handler)
            if reply is not None:
                status, headers, text = reply
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(text.encode())))
                handler.end_headers()
                handler.wfile.write(text.encode())
        finally:
            with self.lock:
                self.under_way -= 1

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
