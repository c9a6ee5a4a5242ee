"""One stage in its own process: ``python -m gpu_check.stage MODULE RECORD``."""

import importlib
import sys
from pathlib import Path

from .record import Record


def main() -> None:
    module, path = sys.argv[1:]
    record = Record(Path(path))
    importlib.import_module(module).run(record)
    record.finish()


if __name__ == "__main__":
    main()
