"""`python -m exporter` is the command `cni-exporter`."""

from exporter.cli import main

main()
