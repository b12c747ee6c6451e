"""Agglomerator: train, test and look into part-whole hierarchies. See README.md and --help."""

import sys

from absl import app, logging

from agglomerator import flags
from agglomerator.settings import UserError


def parse(argv):
    flags.define()
    try:
        return flags.parse(argv)
    except UserError as error:
        fail(error)


def main(parsed):
    logging.set_verbosity(logging.WARNING)  # absl would print what other packages note
    # PyTorch takes seconds to import: --help and wrong flags do not wait for it.
    from agglomerator.run import run

    try:
        run(*parsed)
    except UserError as error:
        fail(error)


def fail(error):
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
