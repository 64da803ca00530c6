"""A small model and a step of training."""

import spectrim  # noqa: F401
from one_step import Model, train_a_step  # noqa: F401

model = Model()
