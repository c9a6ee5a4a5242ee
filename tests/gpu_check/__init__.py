"""``make gpu-check``: everything a GPU can tell about fastok, in one command, in under nine minutes.

Each stage is one module with a function ``run(record)``. It runs in a process of its own under a time limit, so that
one that crashes or hangs does not stop the rest. The runner itself needs nothing beyond the standard library.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
