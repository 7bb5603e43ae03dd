"""`python -m kvarena`: the command line."""

import sys

from kvarena.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
