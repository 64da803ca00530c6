"""Models: which architecture a preset, a file or a model type means, and building it with its weights.

May import: ``lab`` itself and ``data``.
"""
