"""The grammar of a DICOM UID (PS3.5 section 9.1), for whoever takes one from the wire.

A UID becomes a column, a log field and a reference in a result; text that is not a UID is refused at the door. Nothing
here knows which UIDs exist.
"""

import re

# Components are digits without leading zeros; `\d` would let in the digits of every script.
_UID = re.compile(r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))+")


def valid_uid(text: str) -> bool:
    """Say whether `text` is a UID: 1 to 64 characters, digits and dots, no component empty or with a leading zero.

    At least two components, because every registered root has them. Padding is the caller's to remove (PS3.5 9.1).
    """
    return len(text) <= 64 and _UID.fullmatch(text) is not None
