"""What the command line needs to know of a setting."""

from dataclasses import field


def setting(group, default, help, choices=None, low=None, high=None, above=None, usual=None):
    """A field of `Settings`, with its group, help and limits for the command line.

    Args:
        group: key of the group in the help.
        default, help: of the flag.
        choices: the allowed values, or None for all.
        low, high: least and greatest allowed value.
        above: a value that it must exceed.
        usual: a value to advise instead; None for the default.
    """
    limits = {"choices": choices, "low": low, "high": high, "above": above}
    usual = default if usual is None else usual
    return field(default=default, metadata={"group": group, "help": help, "usual": usual} | limits)
