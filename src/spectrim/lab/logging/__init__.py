"""What a run writes while it trains, and reading it back: log, TensorBoard, monitor records, result, terminal.

May import: ``lab`` itself and ``models``.
"""
