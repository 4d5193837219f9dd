import copy
import errno
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict

from mttl_adapters.checkpoint import load_checkpoint, save_checkpoint
from mttl_adapters.errors import CheckpointWarning, DivergedError
from mttl_adapters.kinds import lora_config
from mttl_adapters.loop import mean_loss
from mttl_adapters.training import train_adapter
from mttl_adapters.training_config import TrainingConfig

FAST = TrainingConfig(learning_rate=1e-2)


def train(model, data, config=FAST, **options):
    adapter = lora_config(model, rank=4, alpha=8.0, dropout=0.1)
    return train_adapter(model, adapter, data, config, **options)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_training_lowers_the_loss(model, batches):
    data = batches(1) * 30
    trained = train(model, data)
    assert trained.train_loss < mean_loss(model, data[:1]) - 0.5


def test_the_base_is_given_back_untouched(model, batches):
    before = copy.deepcopy(model)
    data = batches(3)
    train(model, data)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    assert_same(model.state_dict(), before.state_dict())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_global_random_state_is_left_alone(model, batches):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(model, batches(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_adapter(model, batches):
    assert_same(train(model, batches(3)).weights, train(model, batches(3)).weights)


def test_the_weights_load_into_peft_and_give_the_validation_loss(model, batches):
    data, held = batches(8), batches(2, seed=1)
    trained = train(model, data, validation=held)
    peft_model = get_peft_model(copy.deepcopy(model), lora_config(model, rank=4, alpha=8.0))
    set_peft_model_state_dict(peft_model, trained.weights)
    assert isinstance(peft_model, PeftModel)
    loss = mean_loss(peft_model.get_base_model(), held)
    assert loss == pytest.approx(trained.validation_loss, rel=1e-5)


def test_micro_batches_give_the_same_adapter(model, batches):
    config = TrainingConfig(learning_rate=1e-2, micro_batch_size=1)
    adapter = lora_config(model, rank=4, alpha=8.0)
    whole = train_adapter(model, adapter, batches(3), FAST)
    parts = train_adapter(model, adapter, batches(3), config)
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, rtol=1e-3, atol=1e-5)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_an_interrupted_training_ends_as_if_nothing_had_happened(
    model, batches, tmp_path, stop_after
):
    config = TrainingConfig(learning_rate=1e-2, evaluate_every=3)
    data, held = batches(8), batches(2, seed=1)
    whole = train(model, data, config, validation=held)
    path = tmp_path / "checkpoint.safetensors"

    def stop(_what, done, _total):
        if done == stop_after + 1:
            raise StoppedError

    options = {"validation": held, "checkpoint": path, "checkpoint_seconds": -1.0}
    with pytest.raises(StoppedError):
        train(model, data, config, progress=stop, **options)
    resumed = train(model, data, config, **options)
    assert resumed.resumed_from == stop_after
    assert_same(resumed.weights, whole.weights)
    assert (resumed.step, resumed.train_loss) == (whole.step, whole.train_loss)
    assert (resumed.examples, resumed.tokens) == (whole.examples, whole.tokens)


def test_the_weights_of_best_validation_loss_are_kept(model, batches):
    data, held = batches(1) * 40, batches(1, seed=5)
    config = TrainingConfig(learning_rate=5e-2, evaluate_every=1)
    best = train(model, data, config, validation=held)
    last = train(model, data, replace(config, evaluate_every=None), validation=held)
    # It overfits its single batch, so the last weights are not the best.
    assert best.step < last.step == len(data)
    assert best.validation_loss < last.validation_loss
    adapted = get_peft_model(copy.deepcopy(model), lora_config(model, rank=4, alpha=8.0))
    set_peft_model_state_dict(adapted, best.weights)
    loss = mean_loss(adapted.get_base_model(), held)
    assert loss == pytest.approx(best.validation_loss, rel=1e-5)


def test_a_training_that_diverges_is_named_so(model, batches):
    with pytest.raises(
        DivergedError, match=r"loss is nan after \d+ of 20 steps.*lower the learning"
    ):
        train(model, batches(20), TrainingConfig(learning_rate=1e30, max_grad_norm=0.0))


def test_a_last_step_that_diverges_is_found_too(model, batches):
    config = TrainingConfig(learning_rate=1e30, warmup_proportion=0.0)
    with pytest.raises(DivergedError, match="validation loss is nan after 1 of 1"):
        train(model, batches(1), config, validation=batches(1, seed=1))


def test_a_disk_that_fills_up_ends_no_training(model, batches, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = train(model, batches(4))
    monkeypatch.setattr("mttl_adapters.loop.save_checkpoint", full)
    with pytest.warns(CheckpointWarning, match="No space left on device.*training goes on"):
        trained = train(
            model, batches(4), checkpoint=tmp_path / "c.safetensors", checkpoint_seconds=-1.0
        )
    assert_same(trained.weights, whole.weights)


def test_nothing_to_train_on_is_an_error(model):
    with pytest.raises(ValueError, match="no training rows"):
        train(model, [])


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("warmup_proportion", 2.0), ("micro_batch_size", 0)],
)
def test_a_setting_that_cannot_train_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingConfig(**{field: value})


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "folder" / "c.safetensors"
    save_checkpoint(path, {"a": torch.arange(3)}, {"step": 4})
    tensors, state = load_checkpoint(path)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert state == {"step": 4}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\xff" * 100])
def test_a_file_that_is_no_checkpoint_is_none(tmp_path, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    assert load_checkpoint(path) is None
    assert load_checkpoint(tmp_path / "missing") is None
