"""What the method outside of the library needs beside its own file."""

from torch import Tensor


def shifted(logits_TE: Tensor, bias_E: Tensor) -> Tensor:
    """Logits with a bias for each expert."""
    return logits_TE + bias_E.float()
