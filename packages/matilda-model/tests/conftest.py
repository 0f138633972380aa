"""Settings of this package's tests."""

import torch

# the models here are tiny: a second thread costs more in barriers than it computes
torch.set_num_threads(1)
