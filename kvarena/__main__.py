"""`python -m kvarena`: the command line."""

import os
import sys

from kvarena.caches import settle
from kvarena.errors import UserError
from kvarena.experiments.command.streams import all_is_said, make_lasting

os.environ["MPLBACKEND"] = "agg"  # figures are files; one that needs a display, or that is none, would end the import
make_lasting()
try:
    settle()
    if sys.argv[1:2] == ["gpu-validation"]:  # runs where there is no Hydra, as on a borrowed machine
        from kvarena.experiments.gpu_validation.command import main as validate

        validate(sys.argv[2:])
    elif sys.argv[1:2] == ["gpu-kit"]:
        from kvarena.experiments.gpu_validation.kit import main as make_kit

        make_kit(sys.argv[2:])
    else:
        from kvarena.experiments.command.cli import main

        main()
except UserError as error:  # what the files of kernels/ say is read on import
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
finally:
    if not all_is_said():
        sys.exit(1)
