"""`python -m fidelora` is the command line."""

from fidelora.cli import main

main()
