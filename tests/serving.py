"""The demo page as `granalign app` serves it, in a process of its own, for a browser to visit."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def serving(checkpoint: Path, index: Path) -> Iterator[str]:
    """The address of the page, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "granalign_hf.cli", "app", str(checkpoint), "--port", str(port), "--index", str(index)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield _wait_for(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen) -> str:
    for _ in range(600):
        assert process.poll() is None, "the page ended"
        try:
            urllib.request.urlopen(url).close()
            return url
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer in two minutes")
