"""Adapters to training frameworks, a module each, in the framework's own conventions."""
