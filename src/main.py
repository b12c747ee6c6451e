"""Agglomerator: train, test and look into part-whole hierarchies. See README.md and --help."""

import sys

from absl import app, logging

from agglomerator import cli
from agglomerator.islands import window
from agglomerator.util.errors import SharedError, UserError
from agglomerator.util.terminal import say


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
        from agglomerator.commands.dispatch import run
        from agglomerator.util import distributed

        run(*parsed)
    except SharedError as error:
        if distributed.rank() == 0:
            say_error(error)
        # A process that ends makes launchers end the others: none does before it is said.
        distributed.leave_process_group()
        raise SystemExit(2) from None
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def say_error(error):
    say(f"error: {error}", sys.stderr, every_process=True)


def fail(error):
    say_error(error)
    raise SystemExit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
