"""One role as a process: `python -m dicom_node.role ROLE [--config FILE] [--supervised]`.

Apart from `cli`, which hands over to it: a role runs for months and needs no command line, and what that loads would
cost each of the three 5 MiB for good.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

from dicom_node.errors import RemnantError, exit_code


def command(role: str, config: Path | None, *, supervised: bool) -> list[str]:
    """Return what starts a role. Not from the working directory: modules of ours are found where we are installed."""
    options = ["--supervised"] * supervised + ([] if config is None else ["--config", str(config)])
    return [sys.executable, "-P", "-m", "dicom_node.role", role, *options]


def spare(role: str) -> None:
    """Keep out what others load where they find it: rich by structlog for tracebacks, which we never print; numpy and
    Pillow by pydicom for pixels, at which a receiver never looks (20 MiB)."""
    for name in ("rich", "numpy", "PIL") if role == "receive" else ("rich",):
        sys.modules.setdefault(name, cast(ModuleType, None))


def main() -> None:
    """Run a role until a signal; an error of ours is one sentence and an exit code."""
    parser = argparse.ArgumentParser(prog="remnant", description="Run one role of the node until SIGTERM.")
    parser.add_argument("role", choices=("receive", "work", "send"))
    parser.add_argument("--config", type=Path)
    parser.add_argument("--supervised", action="store_true")
    arguments = parser.parse_args()
    spare(arguments.role)
    from dicom_node import log
    from dicom_node.service import RUN
    from dicom_node.settings import load

    try:
        settings = load(arguments.config)
        log.set_up(as_json=settings.log.json_lines, role=arguments.role)
        RUN[arguments.role](settings, supervised=arguments.supervised)
    except RemnantError as error:
        sys.stderr.write(f"remnant: {error}\n")
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
