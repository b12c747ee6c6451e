"""Agglomerator: train, test and look into part-whole hierarchies. See README.md and --help."""

import sys

from absl import app, logging

from agglomerator import flags, islands_window, terminal
from agglomerator.settings import SharedError, UserError


def parse(argv):
    flags.define()
    try:
        return flags.parse(argv)
    except UserError as error:
        fail(error)


def main(parsed):
    logging.set_verbosity(logging.WARNING)  # absl would print what other packages note
    islands_window.leave_backend_to_window()
    try:
        # PyTorch takes seconds to import: --help and wrong flags do not wait for it.
        from agglomerator import processes
        from agglomerator.run import run

        run(*parsed)
    except SharedError as error:
        if processes.rank() == 0:
            say(error)
        processes.part()  # none ends, which makes launchers end the others, before it is said
        raise SystemExit(2) from None
    except UserError as error:
        fail(error)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; name another place, or make room or access.")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def say(error):
    terminal.write(f"error: {error}", sys.stderr)


def fail(error):
    say(error)
    raise SystemExit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
