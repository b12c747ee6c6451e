"""What the command line needs to know of a setting."""

from dataclasses import field


def setting(default, help, choices=None, low=None, high=None, above=None, usual=None):
    """A field of `Settings`, with its help and limits for the command line.

    Args:
        default, help: of the flag.
        choices: the allowed values, or None for all.
        low, high: least and greatest allowed value.
        above: a value that it must exceed.
        usual: a value to advise instead; None for the default.
    """
    limits = {"choices": choices, "low": low, "high": high, "above": above}
    usual = default if usual is None else usual
    return field(default=default, metadata={"help": help, "usual": usual} | limits)
