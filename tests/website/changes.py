"""What is not typed as a page shows it, and why. Everything else is.

A change that fits no longer fails its page's test, and so does a block that is not typed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.website import folders
from tests.website.reader import Change

_WINDOWS = "windows of 96 voxels would be thirty times the volumes here"
STEPS = "20,000 steps of a patch of 96 voxels"
INSTALLED = "it is installed"
SMALL = "a train_student.yaml of a few steps is there, and stays"
_SLURM = ("tests/slurm/test_stage_one.py", "--num-parts")


@dataclass(frozen=True)
class Page:
    """A page that shows commands, each by itself, of a cohort that is there.

    Attributes:
        changes: to what it shows.
        layout: what its folder has beside a cached cohort and students.
        written: patterns of what has to be there at the end.
        said: what has to be printed.
    """

    changes: Sequence[Change] = ()
    layout: folders.Layout | None = None
    written: Sequence[str] = ()
    said: Sequence[str] = ()


PAGES: Mapping[str, Page] = {
    "admission.md": Page(
        (Change("--accept pancreas", "--accept pancreas -c cache_teachers.yaml", _WINDOWS),),
        folders.with_a_bad_teacher,
        written=["work/reports/admission.json"],
        said=["POOR"],
    ),
    "cache.md": Page(
        (
            Change("pip install 'organ-distill[s3]'", "", INSTALLED),
            Change("export AWS_ENDPOINT_URL=https://...", "", "there is no such store"),
            *(
                Change(
                    line,
                    "",
                    "the store of that test is slow",
                    tested=(
                        "tests/integration/test_object_store.py",
                        "test_the_road_through_an_object",
                    ),
                )
                for line in (
                    "pipeline cache-teachers -r data_registry.yaml -w s3://bucket/work",
                    "pipeline train-student  -r data_registry.yaml -w s3://bucket/work",
                    "pipeline predict s3://bucket/work/students/student/student.pt scans/ -o out/",
                )
            ),
            Change("-w damaged", "-w damaged || test $? -eq 1", "1: something is damaged"),
        ),
        folders.in_its_own_folder,
        written=[
            "out/liver-ct/case_000/" + name
            for name in ("liver_liver.nii.gz", "regions.nii.gz", "agreed_background.nii.gz")
        ],
        said=[
            "teacher.window.overlap",
            "differs in 1 input from the nearest that is cached",
            "image/c/0/0/0 is missing",
            "has other bytes than were written",
            "by receipts and sizes: nothing wrong",
            "only in A",
            "out/liver-ct/case_000/conflict.nii.gz",
        ],
    ),
    "check.md": Page(said=["0 errors"]),
    "cluster.md": Page(
        (
            Change(
                "torchrun --max-restarts 0 --nproc-per-node 4 -m pipeline.cli train-student \\\n"
                "  -r data_registry.yaml -w work -c train_student.yaml --workers 3",
                "",
                "four processes that each import torch",
                tested=("tests/stages/test_train_student.py", "torch.distributed.run"),
            ),
            Change(
                "srun pipeline train-student -r data_registry.yaml",
                "export SLURM_TMPDIR=node\npipeline train-student -c train_student.yaml "
                "-r data_registry.yaml",
                "no job of Slurm, and " + STEPS,
            ),
            Change(
                "pipeline cache-teachers -r data_registry.yaml -w work --executor local",
                "",
                "its workers take long to start",
                tested=("tests/faults/test_executors.py", '"local"'),
            ),
            Change(
                "pipeline cache-teachers -r data_registry.yaml -w work --executor tcp://HOST:8786",
                "",
                "there is no such host",
                tested=("tests/faults/test_executors.py", "tcp://127.0.0.1"),
            ),
            Change(
                "pipeline cache-teachers -r data_registry.yaml -w work --executor slurm "
                "--workers 8 --slurm-config gpu.yaml",
                "",
                "there is no Slurm",
                tested=("tests/slurm/test_stage_one_faults.py", "slurm"),
            ),
            Change(
                "srun pipeline cache-teachers -r data_registry.yaml -w work \\\n",
                "export SLURM_ARRAY_TASK_ID=0\n"
                "pipeline cache-teachers -r data_registry.yaml -w work -c cache_teachers.yaml \\\n",
                "no job of Slurm, and " + _WINDOWS,
                tested=_SLURM,
            ),
            Change(
                "srun pipeline cache-teachers -r data_registry.yaml -w work --gate-only",
                "pipeline cache-teachers -r data_registry.yaml -w work -c cache_teachers.yaml "
                "--gate-only",
                "no job of Slurm, and " + _WINDOWS,
                tested=("tests/slurm/test_stage_one.py", "--gate-only"),
            ),
        ),
        folders.with_slurm_settings,
        written=[
            "work/students/student/student.pt",
            "node/organ-distill-staged-*/*",
            "work/reports/cache-teachers.part-0000-of-0016.json",
        ],
        said=["#SBATCH --array=0-15", "#SBATCH --partition=gpu"],
    ),
    "commands.md": Page(
        (
            Change(
                "cache-teachers --report",
                "cache-teachers -c cache_teachers.yaml --report",
                _WINDOWS,
            ),
            Change(
                "pipeline --install-completion ",
                "export HOME=$PWD _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1\n"
                "pipeline --install-completion bash ",
                "not into the home of whoever runs the test; and which shell it is, is told",
            ),
            Change("--show-completion ", "--show-completion bash ", "likewise"),
        ),
        written=["run.json", ".bashrc"],
        said=["complete -o default -F", '"packages": {'],
    ),
    "compare.md": Page(
        (
            Change("--seeds 0,1,2 -r", "--seeds 0,1 -r", "each seed takes seconds"),
            Change("--seeds 0,1,2 --test", "--seeds 0,1 --test", "likewise"),
        ),
        folders.without_comparison,
        written=[
            *(
                f"results/kinds/validation{end}"
                for end in (".html", ".png", ".json", "_table.csv", "_scores.csv")
            ),
            "results/kinds/test.json",
            "work/students/kinds/marginal-seed1/scores_validation.json",
        ],
    ),
    "datasets.md": Page(
        (
            Change(
                "pipeline init --organ liver --organ spleen --organ kidneys --organ pancreas \\\n"
                "  -d lits=LiTS:liver=1+2 \\\n"
                "  -d kits=kits23/dataset:kidneys=1+2+3 \\\n"
                "  -d msd-pancreas=Task07_Pancreas:pancreas=1+2 \\\n"
                "  -d msd-spleen=Task09_Spleen \\\n"
                "  -d btcv=RawData/Training:spleen=1,kidneys=2+3,liver=6,pancreas=11,"
                "background=4+5+7+8+9+10+12+13",
                "",
                "word for word, on folders of those names, elsewhere",
                tested=("tests/unit/setup/init/test_docs_datasets.py", 'blocks("sh")[0]'),
            ),
        ),
    ),
    "evaluate.md": Page(
        (
            Change(
                "pipeline train-student -r data_registry.yaml -w work --fold 0    # this and the "
                "next line with 1, 2, 3 and 4, too\n"
                "pipeline predict work/students/student-fold0/student.pt -r data_registry.yaml "
                "--fold 0 -o held-out/\n"
                "pipeline evaluate held-out/ -r data_registry.yaml --folds        # one table\n"
                "pipeline predict work/students/student-fold0/student.pt scans/ -o out/ \\\n"
                "  --with=work/students/student-fold{1,2,3,4}/student.pt",
                "",
                "five students of a registry in folds",
                tested=("tests/stages/test_evaluate.py", "test_the_road_over_folds"),
            ),
        ),
        written=[
            "out/summary.json",
            "out/scores.csv",
            "out/ms_kd/against.json",
            "out/ms_kd/against.csv",
        ],
    ),
    "exactness.md": Page(
        (
            Change(
                "pipeline train-student -r data_registry.yaml -w work -c train_student.yaml "
                "--self-test",
                "",
                "it kills processes for half a minute",
                tested=("tests/unit/cli/test_self_test.py", '"--self-test"'),
            ),
        ),
    ),
    "export.md": Page(
        (
            Change(
                "cd exported/bundle\n"
                "python -m monai.bundle run --config_file configs/inference.json "
                "--meta_file configs/metadata.json \\\n"
                "  --bundle_root . --dataset_dir /path/to/nifti/files "
                "--output_dir /path/to/labels\n"
                "python -m monai.bundle verify_net_in_out --net_id network_def \\\n"
                "  --meta_file configs/metadata.json --config_file configs/inference.json\n"
                "python -m monai.bundle ckpt_export --net_id network_def "
                "--ckpt_file models/model.pt --filepath model.ts \\\n"
                "  --meta_file configs/metadata.json --config_file configs/inference.json",
                "",
                "three programs of MONAI, each of which imports torch",
                tested=("tests/stages/test_export.py", "verify_net_in_out"),
            ),
        ),
        folders.with_a_student,
        written=[
            "exported/bundle/configs/inference.json",
            "exported/onnx/student.onnx",
            "exported/onnx/student.json",
            "exported/torchscript/student.ts",
            "exported/torchscript/export.json",
        ],
    ),
    "faults.md": Page(
        (
            Change(
                "make faults",
                "",
                "that is the long version of tests/faults",
                tested=("Makefile", "FAULTS=long"),
            ),
        ),
    ),
    "inspect.md": Page(
        written=[
            "inspection/cohort.csv",
            "inspection/cohort.json",
            "inspection/spleen-ct/case_001/figure.png",
        ],
    ),
    "planning.md": Page(
        [Change("plan --student -r", "plan --student -o proposed.yaml -r", SMALL)],
        said=[
            "Plan of stage one",
            "quota",
            "stored as",
            "float16, 5 bits *",
            "Settings for a student",
        ],
        written=["proposed.yaml"],
    ),
    "predict.md": Page(
        layout=folders.without_predictions,
        changes=[
            Change("pip install 'organ-distill[dicom]'", "", "it is installed"),
            *(
                Change(
                    f"pipeline predict student.pt {images} -o out/",
                    "",
                    "no DICOM is made here",
                    ("tests/unit/data/test_dicom.py", "test_predict_takes_a_series"),
                )
                for images in ("patient.zip", "patients/")
            ),
        ],
        written=[
            "out/ct.nii.gz",
            "out/ct.json",
            "out/ct_0000.nii.gz",
            "out/somebody/ct.nii.gz",
            "out/multi-organ-ct/case_001.nii.gz",
            "out/labels.itksnap.txt",
            "out/labels.ctbl",
        ],
    ),
    "real-ct.md": Page(
        (
            Change(
                "ORGAN_DISTILL_SHARED=/path/to/data .venv/bin/python -m pytest "
                "tests/integration/real_ct -q",
                "",
                "a test that starts tests",
            ),
        ),
    ),
    "report.md": Page(
        (Change("-o /tmp/student.html", "-o student.html", "not outside of the test's folder"),),
        folders.with_a_student,
        written=[
            "work/students/student/report.html",
            "student.html",
            "work/students/kinds/ms_kd-seed0/report.html",
        ],
    ),
    "teachers.md": Page(
        (
            Change(
                "--trust pancreas-zoo -w",
                "--trust pancreas-zoo -c cache_teachers.yaml -w",
                _WINDOWS,
            ),
        ),
        folders.with_a_bundle,
        written=["work/teachers/pancreas-zoo@*/liver-ct/*"],
    ),
    "watching.md": Page(
        (
            Change("pip install 'organ-distill[tensorboard]'", "", INSTALLED),
            Change("train-student --logger", "train-student -c train_student.yaml --logger", STEPS),
            Change("tensorboard --logdir WORK/students ", "# ", "a server that does not end"),
        ),
        written=["work/students/student/tensorboard/*"],
    ),
}
