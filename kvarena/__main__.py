"""`python -m kvarena`: the command line."""

import sys

from kvarena.caches import settle
from kvarena.errors import UserError

try:
    settle()
    if sys.argv[1:2] == ["gpu-validation"]:  # runs where there is no Hydra, as on a borrowed machine
        from kvarena.experiments.gpu_validation.command import main as validate

        validate(sys.argv[2:])
    else:
        from kvarena.experiments.command.cli import main

        main()
except UserError as error:  # what the files of kernels/ say is read on import
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
