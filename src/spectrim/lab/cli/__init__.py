"""The command line: one module for each command, and what they share.

May import every other room; none imports it. Modules that are slow to import are imported inside of commands, so that
``spectrim --help`` is quick.
"""
