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
    try:
        # PyTorch takes seconds to import: --help and wrong flags do not wait for it.
        from agglomerator.run import run

        run(*parsed)
    except UserError as error:
        fail(error)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; name another place, or make room or access.")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def fail(error):
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
