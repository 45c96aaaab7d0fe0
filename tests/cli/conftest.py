"""The trainer's fixtures, ways to call the command line, and a meter of a run's own steps."""

import pytest

from gradfold.cli.main import main
from gradfold.planner.step import MicroBatches, record_step
from gradfold.train import loop
from tests.train.conftest import no_pictures, silent, texts, tiny, tokenizer

__all__ = ["no_pictures", "silent", "texts", "tiny", "tokenizer"]


@pytest.fixture
def gradfold(capsys):
    """Call the command line in this process: (exit code, standard error)."""

    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def said(capsys):
    """Call the command line; standard output of a call that must succeed."""

    def call(*words, code=0):
        capsys.readouterr()
        found = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert found == code, err
        return out + err

    return call


@pytest.fixture
def measured(monkeypatch):
    """The live bytes of each of a run's own steps, counted as they are taken."""
    peaks = []

    def step_weights(run, batches):

        def loss(model, batch):
            return run.objective.loss(model, batch)

        inputs = [run.objective.inputs(batch, run.device) for batch in batches]
        reference = getattr(run.objective, "reference", None)
        turns = run.fold._state.turns if run.fold.working_set is not None else None

        def meet(live):
            if reference is not None:
                live.track(reference)
            for member in [] if turns is None else turns.turning:  # states asleep on the device
                live.track([held for _, held in turns._sleeping(member)], category="states")

        memory = record_step(
            run.model,
            run.optimizer,
            MicroBatches(inputs),
            run.fold,
            loss=loss,
            micro_batches=len(inputs),
            meet=meet,
        )
        run.scheduler.step()
        peaks.append(memory.peak_bytes)
        return 1.0, None

    monkeypatch.setattr(loop, "step_weights", step_weights)
    return peaks
