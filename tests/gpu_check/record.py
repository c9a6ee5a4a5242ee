"""What a stage hands back: a JSON file that is up to date whenever the stage ends, however it ends."""

import json
from pathlib import Path
from typing import Any


def one_line(error: BaseException) -> str:
    """An exception in a line: its type and the first line of its message."""
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message[:200]}"


class Record:
    """Facts, failures and a one-line summary of a stage, written to ``path`` at every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.failures: list[str] = []
        self.summary = ""
        self._done = False
        self._save()

    def update(self, summary: str | None = None, **facts: Any) -> None:
        """Replace the summary and some facts."""
        self.summary = self.summary if summary is None else summary
        self.facts |= facts
        self._save()

    def append(self, fact: str, value: Any) -> None:
        """Add ``value`` to the list ``fact``."""
        self.facts.setdefault(fact, []).append(value)
        self._save()

    def fail(self, message: str) -> None:
        """Note a failure; the stage may go on."""
        print("FAILED", message, flush=True)
        self.failures.append(message)
        self._save()

    def finish(self) -> None:
        """The stage came to its end."""
        self._done = True
        self._save()

    def _save(self) -> None:
        content = {"done": self._done, "summary": self.summary, "failures": self.failures, "facts": self.facts}
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(content))
        draft.replace(self.path)
