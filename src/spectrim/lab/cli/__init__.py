"""The command line: one module for each command, and shared options. May import every other room; none imports it.
Commands import torch and other slow modules only when they run, so that ``--help`` is quick.
"""
