"""Writes docs/troubleshooting.md out of the catalogue: every message, by what it is about.

python -m tests.messages.troubleshooting
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tests.messages.sites import ROOT, Site, all_sites

PAGE = ROOT / "docs" / "troubleshooting.md"

# What a file below pipeline/ or stages/ begins with; the first that fits.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Images and label maps",
        ("data/nifti", "data/resample", "data/phantom", "data/volume", "data/labels", "data/sizes",
         "data/hounsfield", "cache/cases", "review/predictions", "review/metrics"),
    ),
    (
        "Settings and the registry",
        ("config", "data/entries", "data/files", "data/registry", "data/splits", "data/patches",
         "setup/check/cohort"),
    ),
    ("`pipeline init`", ("setup/init/",)),
    ("Teachers: nnU-Net", ("teachers/nnunet",)),
    ("Teachers: MONAI bundles", ("teachers/monai_bundle", "teachers/bundle")),
    ("Teachers: exported files", ("teachers/exported",)),
    (
        "Teachers: all kinds",
        ("teachers/", "data/weights", "networks/windows", "consensus/gate", "consensus/evidence",
         "setup/check", "train_teachers", "cache_teachers"),
    ),
    (
        "The cache and the work folder",
        ("cache/", "consensus/", "folder", "cli/cache", "setup/plan", "setup/needs",
         "review/units",
         "review/status", "review/verify", "review/recompute", "review/why", "review/gc",
         "review/cached_files"),
    ),
    ("Several workers, Slurm, job arrays", ("engine/", "setup/submit", "cli/setup")),
    (
        "Predicting, evaluating, comparing, looking, exporting",
        ("student/predict", "student/ensemble", "student/images", "student/inference",
         "student/export", "predict", "evaluate", "export", "compare/", "against", "review/",
         "cli/review", "cli/stages", "figures"),
    ),
    (
        "Training a student",
        ("student/", "networks/", "cli/self_test", "train_student", "setup/student_plan",
         "setup/topology"),
    ),
    ("The command line", ("",)),
)  # fmt: skip

HEAD = Path(__file__).with_name("troubleshooting_head.md")


def page() -> str:
    """The text of the page."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in all_sites():
        if not site.fix:
            continue  # a list of mistakes, each with a remedy of its own
        file = site.file.partition("/")[2]
        title = next(title for title, begins in GROUPS if file.startswith(begins))
        groups[title].append(site)
    parts = [HEAD.read_text(encoding="utf-8")]
    for title, _ in GROUPS:
        if groups[title]:
            rows = [_row(site) for site in groups[title]]
            lines = "\n".join(sorted(dict.fromkeys(rows), key=str.lower))
            parts.append(f"## {title}\n\n| message | what to do |\n| --- | --- |\n{lines}\n")
    return "\n".join(parts)


def _row(site: Site) -> str:
    return f"| {_cell(_shown(site.what))} | {_cell(_shown(site.fix))} |"


def _shown(forms: tuple[str, ...]) -> str:
    """One form, or several with "or" between them."""
    known = [form.strip() for form in dict.fromkeys(forms) if form.strip()]
    return " *or* ".join(known[:4])


def _cell(text: str) -> str:
    """A table's cell: bars and angle brackets would break it."""
    plain = " ".join(text.split())
    return plain.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
