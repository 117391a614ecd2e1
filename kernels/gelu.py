"""GELU, tanh form: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """Elementwise, any shape and dtype; computed in fp32 for 16-bit inputs."""
    return F.gelu(x, approximate="tanh")
