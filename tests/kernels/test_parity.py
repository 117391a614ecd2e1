"""What the other tests measure with leaves torch as it was."""

import parity
import pytest
import torch


@pytest.mark.parametrize(("deterministic", "warn_only"), [(False, False), (True, False), (True, True)])
def test_deterministic_mode_is_put_back(deterministic: bool, warn_only: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    try:
        with parity.triton("gelu"):
            pass
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
