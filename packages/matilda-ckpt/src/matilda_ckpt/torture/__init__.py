"""Crash tests of the commit protocol: in a model, by system calls, and by power cuts.

`matilda-ckpt torture DIR` runs them on the user's own file system; the test suite runs the same
code. Nothing in the package imports this subpackage unless asked to.
"""
