"""Tables, figures and pages of comparisons, sweeps and spectra, drawn from stored results.

A report loads the code for its own kind of result only. May import: ``lab`` itself, ``recipes``, ``models``,
``logging`` and ``training`` (to read a run's folder).
"""
