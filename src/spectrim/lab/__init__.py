"""The lab: trains small language models on real text and compares optimizer recipes.

It needs the extra ``spectrim[lab]``; nothing in the core imports it. This package itself holds what every room uses:
settings (``config``), errors, files and paths. Each room is a package that imports the rooms above it in this list, as
its docstring says, and never one below it; ``tests/lab/test_rooms.py`` holds them to that.

    recipes      recipe names, optimizers from other packages, default learning rates
    data         documents, tokenizers, token streams, batches
    models       architectures, models with their weights
    logging      what a run writes while it trains, and reading it back
    training     one run, from settings to a trained model
    planning     what a recipe does to a model, by arithmetic alone
    reports      tables, figures and pages, drawn from stored results
    experiments  comparisons and sweeps
    diagnosis    spectra of trained models
    claims       the papers' claims, judged
    bench        benchmarks of operators, optimizers and the training loop
    cli          the command line
"""
