"""Adapters to training frameworks, a module each; each imports its own framework only, and nothing here imports any."""
