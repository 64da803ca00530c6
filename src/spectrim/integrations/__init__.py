"""Thin adapters to training frameworks, a module each; every one imports its framework, and nothing here any."""
