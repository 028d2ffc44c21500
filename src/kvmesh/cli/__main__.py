"""`python -m kvmesh.cli`: the `kvmesh` command without its script."""

from kvmesh.cli.app import main

main()
