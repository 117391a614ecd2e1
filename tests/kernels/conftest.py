"""Without a GPU the kernels run in Triton's interpreter, with its rounding repaired."""

import torch

if not torch.cuda.is_available():
    import interpreter

    interpreter.repair()
