"""What a recipe does to every parameter of a model, and what a step costs on many ranks, without training.

May import: ``lab`` itself, ``recipes`` and ``models``.
"""
