"""Two writers add, replace and remove experts against each other, and nothing is lost."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary, ExpertNotFoundError
from mttl_storage import Conflict

PATH = "base_model.model.layer.lora_"
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["layer"]}


N_HOT = 4
"""Experts that both change again and again; each meets the others in its own order."""


def write(uri, writer, n_experts):
    """Change each expert once and some of them often; give back what was acknowledged."""
    library, chance, journal = ExpertLibrary(uri), random.Random(writer), []
    left = chance.sample(range(n_experts), n_experts)
    while left:
        hot = chance.random() < 0.2
        name = f"e{chance.randrange(N_HOT) if hot else left[-1]}"
        value = float(10_000 * writer + len(journal))
        weights = {
            f"{PATH}A.weight": torch.full((1, 4), value),
            f"{PATH}B.weight": torch.ones(4, 1),
        }
        expert = Expert(ExpertInfo(name, expert_config=CONFIG), weights)
        try:
            if name not in library:
                done = ["add", name, library.add_expert(expert)]
            elif chance.random() < 0.5:
                done = ["replace", name, library.replace_expert(expert)]
            else:
                library.remove_expert(name)
                done = ["remove", name, None]
        except (Conflict, ExpertNotFoundError):  # the other was first
            library.refresh()
            continue
        journal.append([library.generation, *done])
        if not hot:
            left.pop()
        if chance.random() < 0.3:
            library.refresh()
    return journal


def in_a_process(uri, writer, n_experts):
    code = f"""
import importlib.util, json
spec = importlib.util.spec_from_file_location("writers", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.write({uri!r}, {writer}, {n_experts})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "n_experts", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_two_processes_lose_nothing(library, scheme, request, n_experts):
    # What is virtual lives in one process, so there it is two threads.
    write_apart = write if scheme == "virtual" else in_a_process
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(write_apart, library.uri, n, n_experts) for n in (1, 2)]
        journals = [future.result() for future in futures]
    done = sorted(entry for journal in journals for entry in journal)
    generations = [generation for generation, *_ in done]
    assert generations == list(range(1, len(done) + 1))  # each has a commit of its own
    assert len(done) >= 2 * n_experts
    library.refresh()
    history = [(c.generation, c.changes[0].kind, c.changes[0].name) for c in library.history()]
    assert history == [(number, kind, f"experts/{name}") for number, kind, name, _ in done]
    left = {}
    for _, _, name, digest in done:
        left[name] = digest
    left = {name: digest for name, digest in left.items() if digest is not None}
    assert {name: library.digest(name) for name in library} == left
    loaded = library.load()
    assert loaded.keys() == left.keys()
    assert all(expert.expert_weights[f"{PATH}B.weight"].sum() == 4 for expert in loaded.values())
    assert library.verify() == []
    if scheme == "hf":
        hub, name = request.getfixturevalue("hub"), library.uri.removeprefix("hf://")
        assert len(hub.commits(name)) == len(done) + 2  # one made the repository, one the library
        assert hub.files(name)["README.md"].decode() == library.card()
