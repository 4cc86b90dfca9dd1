"""The peers' wheels (Liger, cut-cross-entropy, QuACK with what it needs), unpacked beside the environment.

Not into it, so that its own PyTorch, and what that needs, stay; a peer that is not there is reported as unavailable.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

_KEEP_OUT = {"torch", "triton", "pytorch-triton", "numpy"}  # a wheel of these would replace the machine's own
_UNPACK = 60.0
_ADDED = """
import json, site, sys
before = set(sys.path)
site.addsitedir(sys.argv[1])
print(json.dumps([path for path in sys.path if path not in before]))
"""


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Puts the peers' wheels into a folder and returns what must be on the path for them.

    A wheel that is not for this machine is named and left out. Wheels may carry .pth files, which Python reads in site
    folders only, and which may be code (nvidia-cutlass-dsl's is): what they add is returned too.
    """
    folder = folder / "site-packages"  # QuACK takes no folder of another name for a place of installed code
    kept = _kept()
    chosen = sorted(str(path) for path in wheels.glob("*.whl") if _plain(path.name.split("-")[0]) not in kept)
    if not chosen:
        print(f"gpu-check: no wheels of peers in {wheels}", file=sys.stderr)
        return []
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    command += ["--target", str(folder)]
    try:
        if subprocess.run([*command, *chosen], timeout=_UNPACK).returncode:
            for wheel in chosen:  # one that does not fit stops them all
                if subprocess.run([*command, wheel], timeout=_UNPACK).returncode:
                    print(f"gpu-check: left out {wheel}", file=sys.stderr)
    except subprocess.TimeoutExpired:
        print(f"gpu-check: unpacking {wheels} takes longer than {_UNPACK:.0f} s", file=sys.stderr)
    if not folder.is_dir():
        return []
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    added = subprocess.run([sys.executable, "-c", _ADDED, str(folder)], env=environment, capture_output=True, text=True)
    return [str(folder), *(json.loads(added.stdout) if added.returncode == 0 else [])]


def _kept() -> set[str]:
    """What stays the environment's own: PyTorch, and what of its requirements is installed."""
    names = set(_KEEP_OUT)
    for requirement in importlib.metadata.requires("torch") or ():
        name = re.split(r"[^\w.-]", requirement)[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            names.add(_plain(name))
    return names


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
