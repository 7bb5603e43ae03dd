"""`python -m kvarena`: the command line."""

from kvarena.experiments.cli import main

if __name__ == "__main__":
    main()
