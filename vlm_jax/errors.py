"""The one error a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend: one line that names the thing, what was expected, what came, and the fix."""


class DivergedError(UserError):
    """A training whose loss is not finite."""
