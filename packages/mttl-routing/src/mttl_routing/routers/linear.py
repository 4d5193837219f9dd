"""Logistic regression as one linear map, whatever solver found it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """Logits ``weight @ x + bias``.

    Attributes:
        weight: (n, d).
        bias: (n,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(b, n) of (b, d)."""
        return x @ self.weight.to(x.device).T + self.bias.to(x.device)


def logistic(rows: Any, owners: np.ndarray[Any, Any], n_classes: int) -> Linear:
    """Logistic regression on standardised columns, as a map of the columns as they are.

    Args:
        rows: (m, d), dense, or sparse, whose columns are taken as they are.
        owners: (m,) class of each row, from 0, each at least once.
        n_classes: how many there are; with one there is nothing to tell apart, and its logit is 0.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    if n_classes == 1:
        return Linear(torch.zeros(1, rows.shape[1]), torch.zeros(1))
    dense = isinstance(rows, np.ndarray)
    scaler = StandardScaler(with_mean=dense, with_std=dense)
    fitted = LogisticRegression(max_iter=1000).fit(scaler.fit_transform(rows), owners)
    weight, bias = fitted.coef_, fitted.intercept_
    if n_classes == 2:  # one line that tells the second from the first
        weight, bias = np.vstack([0 * weight, weight]), np.append(0 * bias, bias)
    if dense:
        weight = weight / scaler.scale_
        bias = bias - weight @ scaler.mean_
    return Linear(
        torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32))
    )
