"""The command line: lil-ops."""
