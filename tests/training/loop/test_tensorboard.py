"""What TensorBoard shows of a run that was resumed."""

from vtprune_train.training.loop.callbacks.tracking import train_numbers
from vtprune_train.training.loop.tensorboard import hide_from, scalars_shown, steps_lacking


def record(step):
    names = ("loss", "grad_norm", "tokens_per_second", "step_time", "data_wait", "token_accuracy")
    return {"step": step, "learning_rates": {"projector": 0.1}, **dict.fromkeys(names, 1.0)}


def board(folder, steps, hidden_from=None):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), filename_suffix=f".{len(list(folder.glob('*')))}")
    if hidden_from is not None:
        hide_from(writer, hidden_from)
    for step in steps:
        for tag, value in train_numbers(record(step)).items():
            writer.add_scalar(tag, value, step)
    writer.close()


def test_steps_that_tensorboard_shows(tmp_path):
    """As TensorBoard itself says: what came after a resumed checkpoint is hidden, a damaged end is left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tmp_path = tmp_path / "board"
    tmp_path.mkdir()

    def shown():
        accumulator = EventAccumulator(str(tmp_path)).Reload()
        return [event.step for event in accumulator.Scalars("train/loss")]

    def steps_shown():
        return {step for step, scalars in scalars_shown(tmp_path).items() if "train/loss" in scalars}

    board(tmp_path, range(1, 7))
    assert steps_shown() == {1, 2, 3, 4, 5, 6} and shown() == [1, 2, 3, 4, 5, 6]
    board(tmp_path, [5, 6, 7], hidden_from=5)
    assert steps_shown() == set(range(1, 8)) and shown() == list(range(1, 8))
    board(tmp_path, [6], hidden_from=6)
    assert steps_shown() == set(range(1, 7)) and shown() == list(range(1, 7))
    first = sorted(tmp_path.iterdir())[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert steps_shown() == set(shown()) == {1, 2, 3, 5, 6}


def test_steps_whose_scalars_are_not_all_there(tmp_path):
    """A record missing or with another value is seen; float32, NaN and what is no file are not taken for damage."""
    lines = [{**record(step), "loss": 0.1 * step} for step in range(1, 6)]
    events = [(tag, value, line["step"]) for line in lines for tag, value in train_numbers(line).items()]
    events += [("eval/loss", 0.3, 4), ("eval/exact_match", float("nan"), 4), ("eval/large", 1e300, 4)]
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for event in events:
            writer.add_scalar(*event)
    (tmp_path / "a.tfevents.folder").mkdir()
    (tmp_path / "a.tfevents.link").symlink_to("gone")
    shown = scalars_shown(tmp_path)
    assert steps_lacking(events, shown) == []
    for tag, _, step in events:
        value = shown[step].pop(tag)
        assert steps_lacking(events, shown) == [step]
        shown[step][tag] = 7.0
        assert steps_lacking(events, shown) == [step]
        shown[step][tag] = value
    assert steps_lacking(events, shown) == []
