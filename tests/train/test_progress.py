"""The bar, metrics.jsonl, the curve, TensorBoard, and what is printed at the end."""

import json

import pytest
from tensorboard.backend.event_processing import event_accumulator

from corelora.errors import CoreLoraError
from corelora.train.dry_run import check
from corelora.train.plots import loss_curve
from corelora.train.progress import ProgressBar, metrics_row, read_metrics
from corelora.train.run import train
from corelora.train.story import next_steps, shortened
from train.helpers import make_recipe, trainer_of


def test_trainers_logs_get_our_names():
    logs = {"loss": 1.5, "learning_rate": 0.1, "grad_norm": 2.0, "num_input_tokens_seen": 7, "epoch": 0.5}
    assert metrics_row(logs) == {"loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "tokens": 7, "epoch": 0.5}
    logs = {"eval_loss": 1.0, "eval_runtime": 3.0, "eval_f1": 0.5, "eval_samples_per_second": 1.0}
    assert metrics_row(logs) == {"test_loss": 1.0, "test_f1": 0.5}
    assert metrics_row({"train_runtime": 3.0, "train_loss": 1.0, "total_flos": 5.0}) == {}


def test_the_bar_shows_loss_speed_and_memory(folder, tmp_path, capsys):
    train(make_recipe(folder), tmp_path)
    shown = capsys.readouterr().err
    last = [line for line in shown.replace("\r", "\n").splitlines() if line.startswith("training:")][-1]
    assert "6/6" in last
    for word in ("loss=", "tokens/s=", "GiB=", "step/s"):
        assert word in last, word


def test_every_line_is_there_when_a_run_dies(folder, tmp_path):
    """Each line is in the file once its step is over; the bar is closed."""
    trainer = trainer_of(make_recipe(folder, loop={"log_every": 1}), tmp_path)
    seen = []

    class Stop(Exception):
        pass

    def fail(*args, **kwargs):
        seen.append(len(read_metrics(tmp_path / "metrics.jsonl")))
        if len(seen) == 3:
            raise Stop

    trainer.callback_handler.callbacks[-1].on_log = fail
    with pytest.raises(Stop):
        trainer.train()
    assert seen == [1, 2, 3]
    bar = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressBar))
    bar.close()
    assert bar.bar is None


def test_the_curve_is_a_picture(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "test_loss": 1.7}]
    loss_curve(rows, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    loss_curve([], tmp_path / "empty.png", "nothing was logged")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_the_end_says_what_to_do_next(folder, tmp_path):
    recipe = make_recipe(folder)
    results = train(recipe, tmp_path)
    text = next_steps(recipe, tmp_path, results)
    assert f"test loss {results['test_loss']:.4f}" in text
    assert f"corelora evaluate {tmp_path} --suite gsm8k\n" in text
    assert f"corelora export {tmp_path / 'adapter'}" in text
    full = make_recipe(folder, method={"name": "full"})
    text = next_steps(full, tmp_path, results)
    assert str(tmp_path / "model") in text
    assert "corelora export" not in text


def test_long_samples_lose_their_middle():
    text = shortened("a" * 1000 + "b" * 1000, 100)
    assert text == "a" * 50 + " ... " + "b" * 50
    assert shortened("short", 100) == "short"


def test_tensorboard_has_every_line(folder, tmp_path):
    """Training and the test after it, in one folder of the run."""
    train(make_recipe(folder, loop={"report_to": ["tensorboard"]}), tmp_path)
    read = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in read.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in read.Scalars("test/loss")] == [6]
    assert not list((tmp_path / "checkpoints").glob("runs*"))


def test_a_reporter_that_is_not_there_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("corelora.train.dry_run.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CoreLoraError, match="wandb is not installed"):
        check(make_recipe(folder, loop={"report_to": ["wandb"]}), tmp_path)


def test_results_are_json(folder, tmp_path):
    results = train(make_recipe(folder, loop={"steps": 1}), tmp_path)
    assert json.loads(json.dumps(results)) == results
