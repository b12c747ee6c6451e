"""Agglomerator: train, test and look into part-whole hierarchies. See README.md and --help."""

import sys

from absl import app, logging

from agglomerator import cli
from agglomerator.config import SharedError, UserError
from agglomerator.islands import window
from agglomerator.util import terminal


def parse(argv):
    cli.define()
    try:
        return cli.parse(argv)
    except UserError as error:
        fail(error)


def main(parsed):
    logging.set_verbosity(logging.WARNING)  # absl would print what other packages note
    window.leave_backend_to_window()
    try:
        # PyTorch takes seconds to import: --help and wrong flags do not wait for it.
        from agglomerator.commands.run import run
        from agglomerator.util import distributed

        run(*parsed)
    except SharedError as error:
        if distributed.rank() == 0:
            say(error)
        # A process that ends makes launchers end the others: none does before it is said.
        distributed.leave_process_group()
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
