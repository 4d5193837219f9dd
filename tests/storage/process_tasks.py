"""What tests let processes do that they kill.

A process cannot import the modules of tests, so it runs this file by ``runpy.run_path``, with a
TASK of this name, its ARGUMENTS, and the ENVIRONMENT; TELL is its end of a pipe to the test.
"""

import os
import random

from mttl_storage import Repository


def name_of(writer, number):
    return f"experts/w{writer}-i{number}"


def files_of(writer, number):
    """The files of one item; every tenth has a larger one."""
    random_bytes = random.Random(f"{writer} {number}").randbytes
    size = 1 << 20 if number % 10 == 9 else 3000
    return {
        "adapter_model.safetensors": random_bytes(size),
        "adapter_config.json": b"[%d, %d]" % (writer, number),
    }


def write(uri, writer, items, tell=lambda number: None):
    """Add the items of one writer, also those that are there; tell the number of each before."""
    repository = Repository.open(uri)
    for number in range(items):
        tell(number)
        repository.add(name_of(writer, number), files_of(writer, number), {"number": number})


def change(uri, size):
    """Add an item and replace another, in one commit."""
    weights = random.Random(size).randbytes(size)
    with Repository.open(uri).batch() as batch:
        batch.add(
            "experts/new",
            {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"},
            {"size": size},
        )
        batch.replace("experts/old", {"adapter_config.json": b"[2]"})


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)  # noqa: F821 - given by who runs this
    if TASK == "change":  # noqa: F821
        TELL.recv()  # noqa: F821 - not before the test knows whom to kill
        change(*ARGUMENTS)  # noqa: F821
    else:
        write(*ARGUMENTS, TELL.send)  # noqa: F821
