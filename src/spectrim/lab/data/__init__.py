"""Turns text into batches: sources, documents, tokenizers, token streams, their cache, and batches by seed and step.

May import: ``lab`` itself.
"""
