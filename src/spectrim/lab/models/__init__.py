"""Models: the architecture of a preset, a file or a model type, and models with weights.

May import: ``lab`` itself and ``data``.
"""
