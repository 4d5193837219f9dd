"""A download from the hub is told; the hub here is a folder behind a loopback server."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest

from mttl_adapters.progress import download_bar


@pytest.fixture
def hub(tmp_path, model, tokenizer):
    """Address of a hub with one model, ``someone/tiny``."""
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            path = folder / self.path.rpartition("/")[2]
            data = path.read_bytes() if "/resolve/" in self.path and path.is_file() else None
            if "/api/" in self.path:
                data = b"[]" if "/tree/" in self.path else b'{"id": "someone/tiny"}'
            self.send_response(404 if data is None else 200)
            if data is None:
                data = b""
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_from_the_hub_is_told(hub, tmp_path):
    code = (
        "from mttl_adapters import load_base_model\n"
        "base = load_base_model('someone/tiny', progress=lambda *told: print('told', *told))\n"
        "print(base.model_id, base.revision)\n"
    )
    env = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "told downloading model.safetensors, MB 0 0" in done.stdout
    assert done.stdout.splitlines()[-1] == f"someone/tiny {'0' * 40}"


def test_bytes_are_told_as_megabytes_and_files_are_not():
    told = []
    made = download_bar(lambda *args: told.append(args))
    with made(desc="a.bin", unit="B", total=5_000_000, initial=1_000_000) as shown:
        shown.update(2_000_000)
        shown.update(2_000_000)
    made(desc="Fetching", total=3).update(1)
    assert told == [("downloading a.bin, MB", 3, 5), ("downloading a.bin, MB", 5, 5)]


def test_without_anyone_to_tell_there_is_no_bar():
    assert download_bar(None) is None
