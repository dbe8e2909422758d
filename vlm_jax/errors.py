"""`UserError`, the error that users read, and the messages of all other errors."""

import difflib
import errno
import re
from collections.abc import Iterable

LONGEST = 4000  # characters of a UserError
CUT = 300  # characters kept of any other error: some errors print the program
MENDABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EROFS,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EPERM,
)  # fmt: skip


class UserError(ValueError):
    """An error that the user can fix: one line with the thing, what was expected, what came, and the fix.

    Of a very long message (a value of a file, a pattern of the user's), the middle is left out.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}")


class StoreError(UserError):
    """Raised if a store of data, or the cache of its blocks, cannot be used: no example is bad, so the run ends."""


class DeniedError(StoreError):
    """Raised if a store gives no access to a file; some stores say so of files that are not there."""


class DataError(UserError):
    """Raised if the ops do not suit the data: no example is bad by itself, so the run ends."""


class DivergedError(UserError):
    """Raised if the loss of a training is not finite."""


def check_on_disk(path: object, what: str) -> None:
    """Raises a UserError if a path is a URL, or what `pathlib` makes of one: `gs:/bucket`."""
    if found := re.search(r"(?:^|/)((?:s3|gs|gcs|https?|file|memory):/.*)", str(path)):
        raise UserError(
            f"{what} `{found[1]}`: runs write to disk, with locks and renames that stores lack; give a folder that all "
            "hosts see, and copy it to the store by the store's own tool"
        )


def near(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns "did you mean `...`?" with the name in `known` that is nearest to a misspelt one, or `otherwise`."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f"did you mean `{close[0]}`?" if close else otherwise


def mendable(error: BaseException) -> str | None:
    """Returns the message of an error that the user can fix: a `UserError`, a full disk, a file without permission."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return None


def told(error: BaseException) -> tuple[str, int]:
    """Returns (the line that a command prints for an error, its exit status)."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if mendable(error):
        return " ".join(mendable(error).split()), 2
    message = " ".join(f"{type(error).__name__}: {error}".split())
    message = message if len(message) <= CUT else f"{message[:CUT]} ..."
    return f"{message} (a bug? --debug shows the traceback)", 1
