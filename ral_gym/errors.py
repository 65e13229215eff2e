"""What can go wrong by a user's hand: one clear line each, never a traceback.

Library code raises these; the command line prints the message and exits with 2.
A message says what is wrong, the value, what is allowed and what to do.
"""


class RalGymError(Exception):
    """Base of every error a user can mend; ``str(error)`` is the one line to print."""


class DataError(RalGymError):
    """The image source is missing, empty or unreadable."""


class ConfigError(RalGymError, ValueError):
    """A setting is unknown or out of range, or does not fit another one."""


class RunError(RalGymError):
    """A run folder cannot be used: other configuration, missing stage, damaged file, no space."""


class DivergedError(RalGymError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""


class DeviceError(RalGymError):
    """The device asked for does not exist here."""
