"""Which expert a prompt's words speak for: TF-IDF, with a centroid for each expert or a classifier.

Words and signs count, alone and in pairs; so the wording of an instruction tells its task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
from torch import Tensor

from mttl_routing.routers.linear import logistic
from mttl_routing.routers.protocol import Prompt

# Another way to read words is another format.
RECIPE = {"kind": "words", "format": 1}
MOST_TERMS = 100_000
_SETTINGS: dict[str, Any] = {
    "token_pattern": r"(?u)\w+|[^\w\s]",
    "ngram_range": (1, 2),
    "sublinear_tf": True,
    "dtype": np.float32,
}


class Words:
    """Scores of experts by a prompt's words; a function of the tensors that it is kept as.

    Args:
        names: of the experts, one for each line of the weights.
        tensors: from :meth:`fit`; ``vocabulary`` is a JSON list of terms, in UTF-8.
    """

    def __init__(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Read what was fitted."""
        self.names = tuple(names)
        terms = json.loads(tensors["vocabulary"].numpy().tobytes())
        self._vectors = TfidfVectorizer(vocabulary=terms, **_SETTINGS)
        self._vectors.idf_ = tensors["idf"].numpy()
        weight = tuple(tensors[name].numpy() for name in ("values", "columns", "starts"))
        self._weight = sparse.csr_array(weight, shape=(len(self.names), len(terms)))
        self._bias = tensors["bias"].numpy()

    @staticmethod
    def fit(texts: Sequence[Sequence[str]], head: str = "centroid") -> dict[str, Tensor]:
        """What to keep of the texts of each expert.

        Args:
            texts: of each expert, at least one.
            head: ``centroid`` scores by the cosine with an expert's mean vector, ``logistic`` by
                the logits of a logistic regression.
        """
        vectors = TfidfVectorizer(max_features=MOST_TERMS, **_SETTINGS)
        rows = vectors.fit_transform([text for some in texts for text in some])
        owners = np.repeat(np.arange(len(texts)), [len(some) for some in texts])
        if head == "logistic":
            fitted = logistic(rows, owners, len(texts))
            weight, bias = sparse.csr_array(fitted.weight.numpy()), fitted.bias
        else:
            sums = sparse.csr_array((np.ones(len(owners)), (owners, np.arange(len(owners))))) @ rows
            norms = np.sqrt(sums.multiply(sums).sum(axis=1))
            weight = sparse.csr_array(sums.multiply(1 / np.maximum(norms, 1e-12)[:, None]))
            bias = torch.zeros(len(texts))
        terms = json.dumps(vectors.get_feature_names_out().tolist(), ensure_ascii=False)
        return {
            "vocabulary": torch.from_numpy(np.frombuffer(terms.encode(), np.uint8).copy()),
            "idf": torch.from_numpy(vectors.idf_.astype(np.float32)),
            "values": torch.from_numpy(weight.data.astype(np.float32)),
            "columns": torch.from_numpy(weight.indices.astype(np.int32)),
            "starts": torch.from_numpy(weight.indptr.astype(np.int32)),
            "bias": bias,
        }

    def scores(self, prompt: Prompt) -> Tensor:
        """(b, n) float32 on the prompt's device."""
        return torch.from_numpy(self.of_texts(prompt.texts())).to(prompt.input_ids.device)

    def of_texts(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(b, n) float32, of texts."""
        rows = sparse.csr_array(self._vectors.transform(texts))
        scores = (rows @ self._weight.T).toarray() + self._bias
        return np.asarray(scores, np.float32)
