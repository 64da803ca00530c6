"""The files and the terminal output of a run: log, TensorBoard, monitor records and result, written and read back.

May import: ``lab`` itself and ``models``.
"""
