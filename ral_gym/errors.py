"""Errors that a user can fix: one clear line each, never a traceback.

Library code raises these; the command line prints the message and exits with 2.
A message says what is wrong, the value, what is allowed and what to do.
"""

import unicodedata

LONGEST_LINE = 2000
"""Most characters of a message; text from a file could be of any length."""


def printable(text: object, longest: int = LONGEST_LINE) -> str:
    """Untrusted text (names of files, keys, settings), made safe to print on one line of a terminal.

    Control and format characters (escape sequences, line ends, changes of the writing direction), halves of surrogate
    pairs (names that are not UTF-8) and unassigned characters become backslash escapes; what is too long is cut in the
    middle.

    Args:
        text: any object; its `str` is used.
        longest: characters of the result, at least 20.
    """
    given = str(text)
    if len(given) > longest:
        given = f"{given[: longest - longest // 3 - 5]} ... {given[-(longest // 3) :]}"
    if given.isascii() and given.isprintable():
        return given
    return "".join(one if _is_safe(one) else one.encode("unicode_escape").decode("ascii") for one in given)


def _is_safe(character: str) -> bool:
    """Whether a character is visible and does not change the text around it."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


class RalGymError(Exception):
    """Base of every error that a user can fix; ``str(error)`` is the one line to print."""

    def __str__(self) -> str:
        """The message, safe to print: it may quote an untrusted file."""
        return printable(super().__str__())


class DataError(RalGymError):
    """The image source is missing, empty or unreadable."""


class ConfigError(RalGymError, ValueError):
    """A setting is unknown or out of range, or does not fit another one."""


class Listed(ConfigError):
    """A name is unknown; the line is followed by the known ones, one a line.

    Attributes:
        lines: what there is.
    """

    def __init__(self, message: str, lines: list[str]) -> None:
        super().__init__(message)
        self.lines = lines


class RunError(RalGymError):
    """A run folder cannot be used: other configuration, missing stage, damaged file, no space."""


class DivergedError(RalGymError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""


class DeviceError(RalGymError):
    """The requested device does not exist here."""
