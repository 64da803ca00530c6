"""Checks and times everything that only a GPU can show, and writes it down: JSON, and the page docs/gpu.md.

    python benchmarks/cuda.py                                  # all sections, in under six minutes
    python benchmarks/cuda.py --only graph,share               # some of them
    python benchmarks/cuda.py --device cpu --small             # a rehearsal, in under two minutes; writes no page
    python benchmarks/cuda.py --train --minutes 10 --tokens novels.bin

``--train`` trains a model of 34 M parameters by each recipe, all of them for the same number of steps, in so many
minutes together; on tokens of 16 bits in a file, or with ``--data`` on texts that the lab tokenizes. A section or a row
that fails says why, and the rest goes on; results are written whole after every section, to
benchmarks/results/cuda.json and benchmarks/results/cuda-training.json (a rehearsal: under runs/). Exits with 1 if
anything failed.
"""

if __name__ == "__main__":
    from gpu.command import main

    main(__doc__)
else:
    from gpu.namesake import stand_back

    stand_back(__name__, __file__)
