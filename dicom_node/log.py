"""Log lines are events with fields, on standard error.

`log.info("stored", sop_instance_uid=..., took_ms=...)`. What may stand in a field: UIDs, states, counts, durations,
AE titles, addresses. Never a patient's name, ID, birth date or accession number, never a dataset. A log line can be
removed without changing behaviour. Control characters from the wire are escaped, so that a peer cannot forge lines; an
error is told by its kind and place, never by its text, which may quote an element: one line, whatever happens.
"""

import logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

Log = structlog.stdlib.BoundLogger


def set_up(*, as_json: bool, role: str) -> None:
    """Send all events of this process to standard error, as JSON or as aligned text, with `role` on each line."""
    renderer: Any = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _traced,
            _printable,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(role=role)
    # pynetdicom and pydicom put values of elements into their messages; what matters in them we say in events.
    for noisy in ("pynetdicom", "pydicom", "apscheduler", "alembic", "highdicom"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # So do their warnings, which would reach standard error without passing through here.
    warnings.simplefilter("ignore")
    # An error that nobody caught would be printed with its text, and that may quote an element.
    sys.excepthook = lambda _kind, error, _trace: get("process").critical("ended_by_error", exc_info=error)
    threading.excepthook = lambda end: get("process").critical("thread_ended_by_error", exc_info=end.exc_value)


def get(name: str) -> Log:
    """Return the logger of a module; `name` says which part speaks."""
    logger: Log = structlog.get_logger(part=name)
    return logger


def printable(text: str, longest: int) -> str:
    """Return a text from the wire with control characters as escapes, cut to a length that no peer can abuse."""
    cut = text[:longest]
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


class Pace:
    """How often something may be said: `at_once` times, and then `per_s`. Threads may share one."""

    def __init__(self, at_once: float = 30.0, per_s: float = 1.0) -> None:
        self._at_once = self._left = at_once
        self._per_s = per_s
        self._at = time.monotonic()
        self._unsaid = 0
        self._lock = threading.Lock()

    def admit(self) -> int | None:
        """Return how many were left out since the last that was said; None where this one is left out too."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self._at_once, self._left + (now - self._at) * self._per_s)
            self._at = now
            if self._left < 1:
                self._unsaid += 1
                return None
            self._left -= 1
            return self._take()

    def rest(self) -> int:
        """Return how many were left out and not told yet; they count as told."""
        with self._lock:
            return self._take()

    def _take(self) -> int:
        unsaid, self._unsaid = self._unsaid, 0
        return unsaid


def place(error: BaseException) -> str:
    """Say which error it was and where, without its text: the text of a parser's error may hold a patient's name."""
    steps = [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in traceback.extract_tb(error.__traceback__)]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    text = f"{type(error).__name__}{f' at {steps[-1]}' if steps else ''}"
    if len(steps) > 1:
        text += f", called from {' < '.join(reversed(steps[-_STEPS:-1]))}"
    return text if cause is None else f"{text}, after {place(cause)}"


def _traced(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put `place` into the field `trace`: one line, and no value of an element."""
    given = event.pop("exc_info", None)
    if given:
        error = given if isinstance(given, BaseException) else sys.exc_info()[1]
        error = given[1] if isinstance(given, tuple) else error
        if error is not None:
            event["trace"] = place(error)
    return event


def _printable(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value, _MAX_TRACE if key == "trace" else _MAX_FIELD)
    return event


_MAX_FIELD = 500
_MAX_TRACE = 4000
_STEPS = 8
