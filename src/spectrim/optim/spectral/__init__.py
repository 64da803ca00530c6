"""Operations on the singular values of whole matrices, as objects that own all that is theirs.

One class a file: its numbers, its state, what it does to stacks of whole matrices, what it does to shards, its cost and
its label. The pure functions that they call are in :mod:`spectrim.operators`. A recipe names one; nothing else in
``optim`` knows which there are.
"""
