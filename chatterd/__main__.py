"""`python -m chatterd` is the `chatterd` command."""

from chatterd.cli import main

# Not where the process that decodes pictures imports it.
if __name__ == "__main__":
    main()
