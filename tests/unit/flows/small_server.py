"""A server with /health and a process of its own, which it leaves behind: small_server.py PIDS … --port PORT."""

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """200 to everything, and the key that it was given."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"key": os.environ["VLLM_API_KEY"]}).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # and leaves its child behind
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
    Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
    server.serve_forever()
