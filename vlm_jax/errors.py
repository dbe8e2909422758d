"""The one error a user is meant to read, and what is said of the others."""

import errno

CUT = 300  # characters of an error that is no user's: some print the program
MENDABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


class UserError(ValueError):
    """Something the user can mend: one line that names the thing, what was expected, what came, and the fix."""


class DivergedError(UserError):
    """A training whose loss is not finite."""


def mendable(error: BaseException) -> str | None:
    """What the user reads of an error that is theirs to mend: a `UserError`, no room on a disk, no right to a file."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return f"{error.strerror} ({error.filename})"
    return None


def told(error: BaseException) -> tuple[str, int]:
    """(the line that a command says of an error, its exit status)."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if mendable(error):
        return " ".join(mendable(error).split()), 2
    message = " ".join(f"{type(error).__name__}: {error}".split())
    message = message if len(message) <= CUT else f"{message[:CUT]} ..."
    return f"{message} (a bug? --debug shows the traceback)", 1
