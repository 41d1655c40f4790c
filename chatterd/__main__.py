"""`python -m chatterd` is the `chatterd` command."""

from chatterd.cli import main

main()
