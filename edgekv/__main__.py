"""`python -m edgekv` is the `edgekv` command."""

from edgekv.cli.main import main

main()
