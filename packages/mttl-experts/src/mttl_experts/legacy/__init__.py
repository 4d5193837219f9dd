"""Reading what ``torch.save`` wrote, without ever running any of it.

``.ckpt``, ``.meta`` and ``.bin`` of older libraries, and PEFT's ``adapter_model.bin``, are pickles
in a zip archive; opened naively they run code. Here they are data of a small fixed format: whatever
else is in them is refused by name. Nothing outside this package reads a pickle, and nothing in it
uses Python's unpickler.
"""

from mttl_experts.legacy.archive import read_archive
from mttl_experts.legacy.machine import RefusedFileError

__all__ = ["RefusedFileError", "read_archive"]
