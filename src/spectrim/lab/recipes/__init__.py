"""Recipes by name: what a name such as ``adamw+clip`` builds, optimizers by import path, and default learning rates.

May import: ``lab`` itself and the core.
"""
