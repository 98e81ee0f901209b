"""Errors that a user can mend, and the exit codes of the program."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1        # an error of the program itself, or no request could be run
EXIT_USER = 2          # bad input, bad configuration, a machine that cannot run the job
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells expect


class UserError(Exception):
    """Something the user can mend; its text is the whole message.

    The text names the file, the field, the value, and what was expected, as far
    as each of them applies; `at` builds such a text in one form.
    """


def at(where: str, field: str = "", value: object = None, expected: str = "") -> UserError:
    """UserError("where: field = value: expected ..."), leaving out what is not given.

    >>> str(at("job.toml", "run.lanes", 0, "an integer >= 1"))
    'job.toml: run.lanes = 0: expected an integer >= 1'
    """
    text = where
    if field:
        text += f": {field}"
    if value is not None:
        text += f" = {value!r}"
    if expected:
        text += f": expected {expected}"
    return UserError(text)


class AgreedError(UserError):
    """A UserError that every rank knows of: rank 0 prints it, all leave with EXIT_USER."""


class Stalled(Exception):
    """An awaited message made no progress within the deadline; the text says which one."""
