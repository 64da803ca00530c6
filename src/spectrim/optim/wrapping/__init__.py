"""Spectral clipping around any torch optimizer: the base steps, what it changed is clipped and applied."""
