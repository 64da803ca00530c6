"""Claims of the three papers, judged on this machine: theory by arithmetic, training by comparisons of the lab.

``claim`` says what a claim, a check and a finding are. Theory: ``frank_wolfe``, ``spike_noise``, ``entry_noise``,
``regression``. Training: ``studies`` are the comparisons that are run, ``training`` judges them. ``catalogue`` holds
all checks and runs them, ``report`` writes their findings. May import every room but the command line.
"""
