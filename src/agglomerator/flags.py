"""The command line: one absl flag of each setting, grouped help, errors of one line."""

import dataclasses
import textwrap
from types import NoneType

from absl import flags

from agglomerator import terminal
from agglomerator.settings import FIELDS, Settings, UserError, value_types

FLAGS = flags.FLAGS

USAGE = """\
Agglomerator: interpretable part-whole hierarchies for images.

  python src/main.py --flagfile config/config_digits.cfg
  python src/main.py --flagfile config/config_digits.cfg --supervise --load_checkpoint_dir CKPT
  python src/main.py --flagfile config/config_digits.cfg --mode test --load_checkpoint_dir CKPT
  python src/main.py --flagfile config/config_digits.cfg --mode islands --load_checkpoint_dir CKPT

Every setting is a flag, on the command line or in a file named by --flagfile, one a line; the
later one counts.
"""
GROUPS = {
    "run": "What to do",
    "data": "Data",
    "model": "Model",
    "training": "Training",
    "pictures": "Pictures and logs",
    "machine": "Machine",
}


class _ShareOrNumber(flags.ArgumentParser):
    """A share of batches (0.5, 1.0) or, written without a point, their number (1, 10)."""

    def parse(self, argument):
        if isinstance(argument, int | float):
            return argument
        value = float(argument)
        if "." in argument and value <= 1:
            return value
        if not value.is_integer():
            raise ValueError(f"{argument} is neither")
        return int(value)

    def flag_type(self):
        return "share or number"


class _Number(flags.FloatParser):
    """A number; a whole one becomes an integer."""

    def parse(self, argument):
        value = super().parse(argument)
        return int(value) if value.is_integer() else value


class _OptionalInteger(flags.IntegerParser):
    """An integer, or the word None."""

    def parse(self, argument):
        return None if argument in ("None", "none", "", None) else super().parse(argument)


def define():
    """Define a flag for every setting, with its name, type, default and help."""
    for name, option in FIELDS.items():
        types, default, help = value_types(name), option.default, option.metadata["help"]
        if types == (bool,):
            flags.DEFINE_boolean(name, default, help)
        elif types == (int,):
            flags.DEFINE_integer(name, default, help)
        elif types == (float,) or types == (float, NoneType):
            flags.DEFINE_float(name, default, help)
        elif types == (int, NoneType):
            flags.DEFINE(_OptionalInteger(), name, default, help)
        elif types == (int, float):
            parser = _ShareOrNumber() if name.startswith("limit_") else _Number()
            flags.DEFINE(parser, name, default, help)
        else:
            flags.DEFINE_string(name, default, help)


def parse(argv):
    """Read the command line and its flagfiles.

    Returns:
        (settings, given): the checked `Settings`, and the set of names that the user gave.

    Raises:
        UserError: a flag is unknown, malformed, out of its limits, or flags contradict each other.
        SystemExit: help was asked for, and printed.
    """
    if any(argument in ("-h", "-help", "--help", "--helpshort") for argument in argv[1:]):
        terminal.write(help_text())
        raise SystemExit(0)
    try:
        rest = FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        flag = str(error).split(": ")[0].removeprefix("flag ")
        wanted = " or ".join(_in_words(flag.lstrip("-").split("=")[0]))
        raise UserError(f"{flag}: must be {wanted}.") from None
    except UnicodeDecodeError:
        raise UserError("--flagfile: is no text; name a file of flags, one a line.") from None
    except RecursionError:
        raise UserError("--flagfile: names files that name files without end.") from None
    except (flags.Error, ValueError) as error:
        raise UserError(" ".join(str(error).removeprefix("ERROR:: ").split())) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; flags are written --name=value (see --help).")
    given = {name for name in FIELDS if FLAGS[name].present}
    return Settings(**{name: FLAGS[name].value for name in FIELDS}), given


def _in_words(name):
    """What a setting may be."""
    if value_types(name) == (int, float):
        if not name.startswith("limit_"):
            return ["a number"]
        return "a share from 0.0 to 1.0, as 0.5,", "a whole number of batches, as 10"
    words = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "None"}
    return [words.get(kind, "text") for kind in value_types(name)]


def write(settings, file):
    """Write all settings as a flagfile to an open file."""
    file.writelines(
        f"--{name}={value}\n"
        for name, value in dataclasses.asdict(settings).items()
        if value is not None
    )


def help_text():
    """All flags by subject, with types, limits and defaults."""
    lines = [USAGE]
    for group, title in GROUPS.items():
        lines.append(f"{title}:")
        for name, option in FIELDS.items():
            if option.metadata["group"] == group:
                lines += _describe(name, option)
        lines.append("")
    lines.append("--flagfile: file of flags, one a line; # begins a comment.")
    return "\n".join(lines)


def _describe(name, option):
    data = option.metadata
    kinds = [t.__name__ for t in value_types(name) if t is not NoneType]
    limits = []
    if data["choices"]:
        kinds = ["|".join(map(str, data["choices"]))]
    if data["low"] is not None and data["high"] is not None:
        limits.append(f"{data['low']} to {data['high']}")
    elif data["low"] is not None:
        limits.append(f"at least {data['low']}")
    kind = " or ".join(kinds) + "".join(f", {limit}" for limit in limits)
    if kinds == ["bool"]:
        head = f"  --[no]{name}  (default {option.default})"
    else:
        head = f"  --{name}={kind}  (default {option.default})"
    indent = " " * 6
    text = textwrap.wrap(data["help"], 88, initial_indent=indent, subsequent_indent=indent)
    return [head, *text]
