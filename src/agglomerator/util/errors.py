"""Errors that the user can fix."""

LONGEST_LINE = 1000


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, and how to fix it."""

    def __str__(self):
        line = super().__str__()  # it may hold any characters of the user's names and files
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        line = "".join(shown)
        return line if len(line) < LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


class SharedError(UserError):
    """A `UserError` that all processes of a training raise at the same place. One prints it."""
