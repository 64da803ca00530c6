"""Plans without training: a recipe's effect on every parameter of a model, and the cost of a step on many ranks.

May import: ``lab`` itself, ``recipes`` and ``models``.
"""
