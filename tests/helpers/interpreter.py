"""Run as a module: writes what a program can see of its own process, as JSON, and ends with 3.

python -m tests.helpers.interpreter FILE [another command to run and wait for]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    file, *others = sys.argv[1:]
    print("to the output", flush=True)
    print("to the errors", file=sys.stderr)
    seen = {
        "main": [__name__, __spec__.name, sys.modules["__main__"].__dict__ is globals()],
        "argv": sys.argv,
        "path": sys.path,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "parent": os.getppid(),
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:3],
        "standard": [sys.stdin.isatty(), sys.stdout.encoding, sys.stderr.line_buffering],
    }
    own = {"pid": os.getpid(), "random": random.random()}  # not two alike
    Path(file).write_text(json.dumps({"seen": seen, **own}))
    if others:
        subprocess.run([sys.executable, "-m", __spec__.name, *others], check=False)
    sys.exit(3)
