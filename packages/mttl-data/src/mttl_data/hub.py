"""Datasets from the hub, and a clear error soon where there is no hub."""

from __future__ import annotations

from typing import Any

from mttl_data.errors import DataNotReachableError

_PATIENCE_S = 10  # for the hub's first answer; its client would retry for much longer


def hub_dataset(name: str, config: str | None, split: str, instead: str) -> Any:
    """A ``datasets.Dataset`` from the hub or from its cache on this machine.

    Args:
        name: Such as ``"allenai/ai2_arc"``.
        config: Its configuration, such as ``"ARC-Easy"``.
        split: Such as ``"test"``.
        instead: What to do without a hub, for the error's last words.

    Raises:
        DataNotReachableError: It is not in the cache, and the hub does not answer or has it not.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import errors

    # The base error of whichever httpx the client has.
    transport: type[Exception] = vars(errors)["HTTPError"]
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "README.md", repo_type="dataset")
        if not isinstance(cached, str):  # else datasets may do without the hub
            huggingface_hub.HfApi().dataset_info(name, timeout=_PATIENCE_S)
        return datasets.load_dataset(name, config, split=split)
    except (OSError, transport) as error:
        raise DataNotReachableError(
            f"cannot reach the dataset {name!r} on the hub ({type(error).__name__}); {instead}"
        ) from error
