"""``python -m undercroft``: the command line."""

from undercroft.cli import main

main()
