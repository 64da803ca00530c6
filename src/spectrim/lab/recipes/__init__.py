"""Recipes by names such as ``adamw+clip``, optimizers by import path, and default learning rates.

May import: ``lab`` itself and the core.
"""
