"""Whose scan it is, as plain data: an identity, where two identities differ, and one that a person accepted.

What the camera sent and what the archive knows are compared here, element by element (PS3.4 C.6.2.1: the keys of the
Study Root at STUDY level). Equality is strict on purpose: a doubt holds a result back, a person looks, nothing is lost.
Differences are told by the names of the elements, never by their values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Identity:
    """Patient, study and order as decoded text without padding; "" where there is none.

    `patient_birth_date` and `patient_sex` go with an identity and are not compared: archives complete and correct them,
    and where PatientID, issuer, name and accession number agree, the result is in the right record all the same.
    """

    study_instance_uid: str
    patient_id: str = field(repr=False)
    issuer_of_patient_id: str = field(repr=False)
    patient_name: str = field(repr=False)
    accession_number: str = field(repr=False)
    patient_birth_date: str = field(default="", repr=False)
    patient_sex: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class AcceptedIdentity:
    """An identity that a person accepted for a scan in place of the received one.

    origin: "archive" (its answer to a query) or "resend" (the same image sent again). said_by: the destination's name
    or the sender's AE title. received_from: AE title that sent the values replaced. accepted_at: the worklist's time.
    series: (SOPInstanceUID, SeriesInstanceUID) of the images in the accepted study; empty where it is the received one.
    """

    identity: Identity
    origin: str
    said_by: str
    received_from: str
    accepted_at: str
    series: tuple[tuple[str, str], ...] = ()


_LOST = {"?", "\x1a", "\ufffd"}


def differences(expected: Identity, known: Identity) -> tuple[str, ...]:
    """Return the keywords of the elements in which two identities of one study differ, empty where they agree.

    An issuer counts only where both name one. Names are compared by component group (PS3.5 6.2.1.2), spaces and case
    apart: each group that both have must be equal, and they must have one in common.
    """
    differing = []
    if expected.patient_id.strip() != known.patient_id.strip():
        differing.append("PatientID")
    issuers = {one.issuer_of_patient_id.strip() for one in (expected, known)} - {""}
    if len(issuers) > 1:
        differing.append("IssuerOfPatientID")
    if not same_name(expected.patient_name, known.patient_name):
        differing.append("PatientName")
    if expected.accession_number.strip() != known.accession_number.strip():
        differing.append("AccessionNumber")
    return tuple(differing)


def same_name(first: str, second: str) -> bool:
    """Say whether two decoded person names are one."""
    one, other = dict(_groups(first)), dict(_groups(second))
    if not one and not other:
        return True
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[group] == other[group] for group in shared)


def _groups(name: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (0 alphabetic, 1 ideographic, 2 phonetic; components) of the groups that can be compared: not empty, and
    without what archives put in the place of a character that their own set lacks."""
    for index, group in enumerate(name.split("=")):
        if _LOST & set(group):
            continue
        components = [" ".join(part.split()).casefold() for part in group.split("^")]
        while components and not components[-1]:
            components.pop()
        if components:
            yield index, tuple(components)
