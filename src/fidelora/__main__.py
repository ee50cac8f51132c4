"""Entry point of `python -m fidelora`, which runs the command line."""

from fidelora.cli import main

main()
