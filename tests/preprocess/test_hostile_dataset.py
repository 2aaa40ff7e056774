"""Nothing that lies in a dataset, or in the work folder of a resumed run, is run by what reads it."""

import shutil
from pathlib import Path

from megatron_long.dataset.inspection import DatasetBrowser
from megatron_long.dataset.manifest import read_manifest
from megatron_long.dataset.report_page import write_report
from megatron_long.dataset.verification import verify_dataset
from megatron_long.evaluation.loss.held_out import open_held_out
from megatron_long.preprocess.stages import TokenizeStage, WriteStage
from tests import hostile


def test_a_dataset(tiny_dataset, tmp_path):
    folder = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    source = next(iter(read_manifest(folder).valid))
    readers = [
        lambda: list(verify_dataset(folder)),
        lambda: DatasetBrowser(folder).describe_document(0),
        lambda: DatasetBrowser(folder, source).describe_document(0),
        lambda: open_held_out(folder, read_manifest(folder)),
        lambda: write_report(tmp_path / "report", read_manifest(folder)),
    ]
    assert hostile.plant_everywhere(folder, readers) > 100


def test_jobs_of_a_run_that_goes_on(tmp_path):
    for stage in (TokenizeStage(tmp_path / "work", 0), WriteStage(tmp_path / "work")):
        stage.work.mkdir(exist_ok=True)
        stage.job_path.touch()
        assert hostile.plant_everywhere(stage.work, [lambda: stage.run(0)])  # noqa: B023
        stage.job_path.unlink()
