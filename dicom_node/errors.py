"""Errors for the person who has to act.

An exception says what was being done, to which study, and what the person can do about it; it knows whether trying
again makes sense. Text never holds a patient's name, ID, birth date or accession number: a study is named by its UID.
"""

import sys

DONE, ANSWER_IS_NO, WRONG_USE, ENVIRONMENT = 0, 1, 2, 3
"""Exit codes: done; it ran and the answer is no (declined, unhealthy); wrong use; the environment failed."""


class RemnantError(Exception):
    """Something a person has to know.

    Parameters
    ----------
    message: what was being done and what went wrong, one sentence.
    hint: what the person can do now.
    study: StudyInstanceUID (or SOPInstanceUID) concerned, "" if none.
    retry: True where the same attempt may succeed later without anybody's help.
    """

    def __init__(self, message: str, *, hint: str = "", study: str = "", retry: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.study = study
        self.retry = retry

    def __str__(self) -> str:
        study = f" (study {self.study})" if self.study else ""
        text = f"{self.message}{study}"
        if not self.hint:
            return text
        return f"{text} {self.hint}" if text.endswith(".") else f"{text}; {self.hint}"


class WrongUse(RemnantError):  # noqa: N818 - named for what it says
    """The command was called with something that cannot be: a path that is not there, a word that is no choice."""


class SettingsError(WrongUse):
    """The settings are wrong: a key, a unit, or a file. Always names the key."""


class StorageError(RemnantError):
    """The spool cannot take or give bytes: no room, no permission, a digest that does not match."""


def exit_code(error: RemnantError) -> int:
    """Return the exit code of a command or process that ends by an error."""
    if isinstance(error, WrongUse):
        return WRONG_USE
    # Loaded already where it was raised; a command that has nothing to do with the worklist need not load it for this.
    states = sys.modules.get("dicom_node.worklist.states")
    if states is not None and isinstance(error, states.TransitionRefused):
        return ANSWER_IS_NO
    return ENVIRONMENT
