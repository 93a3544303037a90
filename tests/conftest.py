"""Settings of the whole suite, and the one fixture for programs that are not ours."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pydicom.config
import pytest

pydicom.config.INVALID_KEYWORD_BEHAVIOR = "RAISE"


@pytest.fixture(scope="session")
def peer() -> Callable[[str], Path]:
    """Find a real program by name or path; missing is a failure in CI and a skip, with its name, elsewhere.

    Judges that come from PyPI lie beside the interpreter. DCMTK's programs are asked for by full path, because
    pynetdicom puts others of the same names there.
    """

    def find(program: str) -> Path:
        found = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        if found is None:
            message = (
                f"{program} is not installed: run `make peers` (apt: dcmtk, orthanc, postgresql, sqlite3, chromium)"
            )
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        return Path(found)

    return find
