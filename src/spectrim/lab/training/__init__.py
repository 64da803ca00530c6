"""Trains one run: folder, loop, loss, evaluation, learning rate, checkpoints, processes and devices.

May import: ``lab`` itself, ``recipes``, ``data``, ``models`` and ``logging``.
"""
