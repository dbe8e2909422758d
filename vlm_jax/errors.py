"""The one error a user is meant to read."""

import errno


class UserError(ValueError):
    """Something the user can mend: one line that names the thing, what was expected, what came, and the fix."""


class DivergedError(UserError):
    """A training whose loss is not finite."""


def mendable(error: Exception) -> str | None:
    """What the user reads of an error that is theirs to mend: a `UserError`, no room on a disk, no right to a file."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"{error.strerror} ({error.filename})"
    return None
