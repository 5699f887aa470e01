"""`python -m vidgen.cli`."""

from vidgen.cli import main

main()
