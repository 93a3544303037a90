"""`make judges`: every combination before every judge and through both archives, and PixelMed's validator on reports.

Not part of `make test`, because of the time it takes. PixelMed looks at the pairwise selection only: it starts a Java
machine for each report.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicom_node.report import codes
from dicom_node.report.equipment import code_item

pytestmark = pytest.mark.xdist_group("orthanc")

_JARS = tuple(Path("/usr/share/java") / name for name in ("pixelmed.jar", "xalan2.jar", "serializer.jar"))
# Its Java's own XSLT processor does not run PixelMed's style sheets.
_FACTORY = "-Djavax.xml.transform.TransformerFactory=org.apache.xalan.processor.TransformerFactoryImpl"
_FALSE_ALARMS = (
    # PS3.16 has both: Algorithm Manufacturer in TID 4019, qualitative evaluations in TID 1410. The third extends TID
    # 300, which may be extended: which focus a figure is of.
    '(122405,DCM,"Algorithm Manufacturer"): Content Item not in template',
    '(RMN001,99REMNANT,"Residual thyroid tissue after thyroidectomy"): Content Item not in template',
    '(RMN012,99REMNANT,"Focus of uptake"): Content Item not in template',
)


def test_an_object_is_right_by_every_judge_and_comes_back_from_every_archive_as_it_was_sent(
    row: Any, right_by_all: Callable[[Any], None]
) -> None:
    right_by_all(row)


@pytest.fixture(scope="module")
def pixelmed(peer: Callable[[str], Path]) -> Callable[[Path], list[str]]:
    """Ask PixelMed's DicomSRValidator about a report; returns what it says."""
    program = peer("java")
    if missing := [str(jar) for jar in _JARS if not jar.exists()]:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent(f"{', '.join(missing)} is not installed: `make judges` (apt: libpixelmed-java libxalan2-java)")

    def ask(path: Path) -> list[str]:
        classes = ":".join(map(str, _JARS))
        command = [program, _FACTORY, "-classpath", classes, "com.pixelmed.validate.DicomSRValidator", path]
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
        return (said.stdout + said.stderr).splitlines()

    return ask


def test_pixelmed_finds_no_error_in_a_report_and_nothing_outside_of_its_template(
    chosen_rows: Sequence[Any],
    make: Callable[[Any], list[Any]],
    pixelmed: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "sr.dcm"
    looked_at = 0
    for row in (row for row in chosen_rows if row.kind.endswith("_sr")):
        path.write_bytes(make(row)[0].data)
        if row.outcome == "not_analysed" and row.kind != "basic_text_sr":
            # A note's own title extends CID 7021. PixelMed holds that list for closed and then looks at nothing below.
            assert not [line for line in pixelmed(path) if line.startswith("Error")]
            ds = dcmread(path)
            ds.ConceptNameCodeSequence = [code_item(codes.TITLE)]
            ds.save_as(path)
        said = pixelmed(path)
        assert "IOD validation complete" in said
        assert not [line for line in said if line.startswith("Error")]
        if row.kind != "basic_text_sr":  # claims no template
            assert "Found Root Template TID_1500 (MeasurementReport)" in said
            warnings = [line for line in said if line.startswith("Warning")]
            assert not [line for line in warnings if not line.endswith(_FALSE_ALARMS)]
        looked_at += 1
    assert looked_at > 20
