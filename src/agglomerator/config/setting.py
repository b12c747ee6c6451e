"""What the command line needs to know of a setting."""

from dataclasses import field


def setting(group, default, help, choices=None, low=None, high=None):
    """A field of `Settings`, with its group, help and limits for the command line."""
    metadata = {"group": group, "help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)
