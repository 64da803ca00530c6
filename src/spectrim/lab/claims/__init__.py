"""Judges the three papers' claims on this machine: theory by arithmetic, training by comparisons of the lab.

``claim`` defines claims, checks and findings. Theory: ``frank_wolfe``, ``spike_noise``, ``entry_noise``,
``regression``. Training: ``studies`` runs the comparisons, ``training`` and ``paired`` judge them. ``catalogue`` holds
all checks and runs them, ``report`` writes the findings. May import every room but the command line.
"""
