"""Log lines are events with fields, on standard error.

`log.info("stored", sop_instance_uid=..., took_ms=...)`. What may stand in a field: UIDs, states, counts, durations,
AE titles, addresses. Never a patient's name, ID, birth date or accession number, never a dataset. A log line can be
removed without changing behaviour. Control characters from the wire are escaped, so that a peer cannot forge lines.
"""

import logging
import sys
import warnings
from collections.abc import MutableMapping
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
            structlog.processors.format_exc_info,
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


def get(name: str) -> Log:
    """Return the logger of a module; `name` says which part speaks."""
    logger: Log = structlog.get_logger(part=name)
    return logger


def _printable(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape control characters in every text field and cut it to a length that no peer can abuse."""
    for key, value in event.items():
        if isinstance(value, str) and key != "exception" and not (value.isprintable() and len(value) <= _MAX_FIELD):
            cut = value[:_MAX_FIELD]
            event[key] = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return event


_MAX_FIELD = 500
