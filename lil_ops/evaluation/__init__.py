"""Evaluation: run a model on problems with policies and stop rules, keep what came out, and judge it end to end.

`lil-ops eval`, `lil-ops replay` and `lil-ops report` are the command line on top of it. Nothing here is imported by the
rest of the package.
"""
