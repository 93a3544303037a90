"""The beginning of a DICOM file: preamble, prefix and file meta information (PS3.10 7.1).

Written directly, because the receiver does it for every object while the camera waits; the tests hold it to pydicom's
writer and reader.
"""

import struct

from dicom_node.contexts import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME


def part_10_header(
    sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_ae_title: str = ""
) -> bytes:
    """Return what goes before an encoded dataset to make it a file. UIDs must be valid (`uids.valid_uid`).

    source_ae_title: who sent it, so that the file alone still says so (Source Application Entity Title).
    """
    group = (
        struct.pack("<HH2sHI", 2, 0x0001, b"OB", 0, 2)
        + b"\0\1"
        + b"".join(
            struct.pack("<HH2sH", 2, number, vr, len(value)) + value
            for number, vr, value in (
                (0x0002, b"UI", _even(sop_class_uid, b"\0")),
                (0x0003, b"UI", _even(sop_instance_uid, b"\0")),
                (0x0010, b"UI", _even(transfer_syntax_uid, b"\0")),
                (0x0012, b"UI", _even(IMPLEMENTATION_CLASS_UID, b"\0")),
                (0x0013, b"SH", _even(IMPLEMENTATION_VERSION_NAME, b" ")),
                (0x0016, b"AE", _even(source_ae_title[:16], b" ")),
            )
            if value
        )
    )
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(group)) + group


def _even(value: str, padding: bytes) -> bytes:
    encoded = value.encode("ascii", "replace")
    return encoded + padding * (len(encoded) % 2)
