"""The tests' models are tiny: one thread runs them fastest, and leaves the other cores alone."""

import torch

torch.set_num_threads(1)
