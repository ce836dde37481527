"""How far two computations of one number may differ that add in another order, on any processor.

Bit equality is for the same arithmetic alone: the same call with the same shapes, copied or untouched tensors, integers.
A product of another height, a cached token, a padded row or another attention kernel rounds differently.
"""

import torch


def tolerance(layers: int, width: int = 24, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """`atol` and `rtol` for values of about 1, as keywords of `torch.testing.assert_close`.

    Rounding a sum of `width` terms errs by about eps √width; each layer adds its own error to the one it is handed.

    Args:
        layers: how many layers the value went through, a core layer counted once for every step.
        width: number of terms in a sum: the model's width (the zoo's, unless said), or the tokens of a scan.
        dtype: float32 or float64; sums of half types are rounded once, so their size says little.
    """
    error = torch.finfo(dtype).eps * width**0.5 * layers
    return {"atol": 4 * error, "rtol": 16 * error}
