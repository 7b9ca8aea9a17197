"""The tests' models are tiny: one thread runs them fastest, and leaves the other cores alone."""

import tempfile

import torch
from hypothesis import configuration

torch.set_num_threads(1)
NOTES = tempfile.TemporaryDirectory()  # of hypothesis, which would put them beside the code
configuration.set_hypothesis_home_dir(NOTES.name)
