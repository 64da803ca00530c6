"""One training run: its folder, loop, loss, evaluation, learning rate, checkpoints, and its processes and devices.

May import: ``lab`` itself, ``recipes``, ``data``, ``models`` and ``logging``.
"""
