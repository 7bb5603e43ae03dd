"""`python -m kvarena`: the command line."""

import sys

if sys.argv[1:2] == ["gpu-validation"]:  # runs where there is no Hydra, as on a borrowed machine
    from kvarena.experiments.gpu_validation.command import main as validate

    validate(sys.argv[2:])
else:
    from kvarena.experiments.command.cli import main

    main()
