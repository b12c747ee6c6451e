"""The command line: an absl flag for each setting, help by subject, errors of one line."""

import codecs
import dataclasses
import io
import os
import re
import textwrap
from collections import Counter
from pathlib import Path
from types import NoneType

from absl import flags

from agglomerator.config import FIELDS, GROUPS, Settings, value_types
from agglomerator.config.derived import derive
from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say

FLAGS = flags.FLAGS

USAGE = """\
Agglomerator: interpretable part-whole hierarchies of images. CKPT is the path of a checkpoint.

  python src/main.py --flagfile config/config_digits.cfg
  python src/main.py --flagfile config/config_digits.cfg --supervise --load_checkpoint_dir CKPT
  python src/main.py --flagfile config/config_digits.cfg --mode test --load_checkpoint_dir CKPT
  python src/main.py --flagfile config/config_digits.cfg --mode islands --load_checkpoint_dir CKPT
  python src/main.py --flagfile config/config_digits.cfg --mode explore --load_checkpoint_dir CKPT

Every setting is a flag, on the command line or in a file that --flagfile names. If a flag comes
twice, the later one counts.
"""
FLAGFILE = """\
--flagfile: file with one flag per line, such as --levels=2 or --levels 2. A # begins a comment, and
      quotes may surround a value. It may name other flagfiles, beside it or in the working folder.
"""
MOST_FLAGFILES = 50  # that name one another
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class _ShareOrNumber(flags.ArgumentParser):
    """A share of batches (0.5, 1.0) or, written without a point, a number of batches (1, 10)."""

    def parse(self, argument):
        if isinstance(argument, int | float):
            return argument
        value = float(argument)
        if "." in argument and value <= 1:
            return value
        if not value.is_integer():
            raise ValueError(f"{argument} is neither a share nor a whole number")
        return int(value)

    def flag_type(self):
        return "share or number"


class _Number(flags.FloatParser):
    """A number; a whole one becomes an integer."""

    def parse(self, argument):
        value = super().parse(argument)
        return int(value) if value.is_integer() else value


class _Optional(flags.ArgumentParser):
    """The values of another parser, or the word None."""

    def __init__(self, parser):
        self.parser = parser

    def parse(self, argument):
        return None if argument in ("None", "none") else self.parser.parse(argument)

    def flag_type(self):
        return self.parser.flag_type()


class Given(frozenset):
    """Names of the settings that the user gave. `typed` holds those on the command line itself, not
    only in a flagfile."""

    typed = frozenset()


def define():
    """Define a flag for every setting, with its name, type, default and help."""
    parsers = {
        (int,): flags.IntegerParser(),
        (float,): flags.FloatParser(),
        (str,): flags.ArgumentParser(),
        (int, float): _ShareOrNumber(),
    }
    for name, option in FIELDS.items():
        types, default, help = value_types(name), option.default, option.metadata["help"]
        if types == (bool,):
            flags.DEFINE_boolean(name, default, help)
            continue
        kinds = tuple(kind for kind in types if kind is not NoneType)
        parser = parsers[kinds] if kinds != (int, float) or name.startswith("limit_") else _Number()
        flags.DEFINE(_Optional(parser) if NoneType in types else parser, name, default, help)


def parse(argv):
    """Read the command line and the flagfiles that it names.

    Returns:
        (settings, given): the checked `Settings`, and `Given`.

    Raises:
        UserError: a flag is unknown, malformed or out of its limits, or two flags contradict each
            other.
        SystemExit: the user asked for help, which is printed.
    """
    if any(argument in ("-h", "-help", "--help", "--helpshort") for argument in argv[1:]):
        say(help_text())
        raise SystemExit(0)
    program, *arguments = argv
    plain, arguments, in_files = [], iter(arguments), Counter()
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            plain.append(argument)
            continue
        _take(program, plain)
        plain = []
        before = {name: FLAGS[name].present for name in FIELDS}
        for where, line in _lines_of(path if equals else next(arguments, "")):
            _take(program, [line], where)
        in_files.update({name: FLAGS[name].present - before[name] for name in FIELDS})
    _take(program, plain)
    given = Given(name for name in FIELDS if FLAGS[name].present)
    given.typed = frozenset(name for name in given if FLAGS[name].present > in_files[name])
    values = {name: FLAGS[name].value for name in FIELDS}
    return Settings(**derive(values, given)), given


def _take(program, arguments, where=""):
    """Let absl read arguments that name no flagfile. `where` begins the message of an error."""
    try:
        rest = FLAGS([program, *arguments])
    except flags.IllegalFlagValueError as error:
        flag = str(error).split(": ")[0].removeprefix("flag ")
        name = flag.lstrip("-").split("=")[0]
        wanted = f"{flag}: must be {_in_words(name)}." if name in FIELDS else str(error)
        raise UserError(where + wanted) from None
    except (flags.Error, ValueError) as error:
        raise UserError(where + " ".join(str(error).split())) from None
    if len(rest) > 1:
        message = f"{rest[1]}: not a flag; flags are written --name=value (see --help)."
        raise UserError(where + message)


def _lines_of(name, within=(), where="--flagfile="):
    """The flags of a flagfile and of the flagfiles that it names.

    Args:
        name: path of the file.
        within: paths of the files that name it.
        where: beginning of the message if the file cannot be read.

    Yields:
        (place, argument): the beginning of the message of an error in this line, and the flag as
            on the command line.

    Raises:
        UserError: a file or a line cannot be read.
    """
    if len(within) > MOST_FLAGFILES:
        raise UserError("--flagfile: the files name one another without end.")
    path = Path(os.path.expanduser(name))
    try:
        if within and (within[-1].parent / path).is_file():
            path = within[-1].parent / path
        content = path.read_bytes()
        encoding = next((e for bom, e in ENCODINGS.items() if content.startswith(bom)), "utf-8")
        text = content.decode(encoding)
    except OSError as error:
        reason = f"{error.strerror}; name a file with one flag per line."
        raise UserError(f"{where}{name}: {reason}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{where}{name}: not a text in UTF-8; name a file with one flag per line.")
    if path.resolve() in within:  # its flags are read already
        return
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        place = f"{path}, line {number}: "
        name, value = _flag_of(line, place)
        if name == "flagfile":
            yield from _lines_of(value or "", (*within, path.resolve()), f"{place}--flagfile=")
        elif name:
            yield place, f"--{name}" if value is None else f"--{name}={value}"


def _flag_of(line, place):
    """Name and value of the flag in a line of a flagfile, None for what is missing."""
    line = line.strip()
    if not line or line.startswith(("#", "//")):
        return None, None
    name, equals, rest = re.fullmatch(r"-{0,2}([^\s=]*)(\s*=)?(.*)", line).groups()
    quoted = re.fullmatch(r"""\s*(["'])(.*?)\1(\s+(#|//).*)?""", rest)
    value = quoted[2] if quoted else re.sub(r"\s(#|//).*", "", rest).strip()
    if not name:
        raise UserError(f"{place}{line}: not a flag; flags are written --name=value (see --help).")
    if not quoted and (value.startswith(('"', "'")) or re.search(r"\s--\w", value)):
        raise UserError(
            f"{place}{line}: write one flag per line, and quotes around the whole value."
        )
    return name, value if equals or quoted or value else None


def _in_words(name):
    """The kinds of value that a setting takes, in words."""
    if value_types(name) == (int, float):
        if not name.startswith("limit_"):
            return "a number"
        return "a share from 0.0 to 1.0, such as 0.5, or a whole number of batches, such as 10"
    words = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "None"}
    return " or ".join(words.get(kind, "text") for kind in value_types(name))


def write(settings, file):
    """Write all settings as a flagfile to an open file."""
    for name, value in dataclasses.asdict(settings).items():
        if isinstance(value, str) and re.search(r"""[\s"']""", value):
            quote = "'" if '"' in value else '"'
            value = f"{quote}{value}{quote}"
        if value is not None:
            file.write(f"--{name}={value}\n")


def help_text():
    """All flags by subject, with types, limits and defaults."""
    lines = [USAGE]
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        for name in names:
            lines += _describe(name, FIELDS[name])
        lines.append("")
    return "\n".join(lines) + "\n" + FLAGFILE.rstrip()


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
    elif data["above"] is not None:
        limits.append(f"more than {data['above']}")
    kind = " or ".join(kinds) + "".join(f", {limit}" for limit in limits)
    if kinds == ["bool"]:
        head = f"  --[no]{name}  (default {option.default})"
    else:
        head = f"  --{name}={kind}  (default {option.default})"
    indent = " " * 6
    text = textwrap.wrap(data["help"], 88, initial_indent=indent, subsequent_indent=indent)
    return [head, *text]
