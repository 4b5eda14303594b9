"""The pages that are not written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from website import links
from website.command_reference import command_reference
from website.field_reference import describe

_REGISTRY = """\
# Fields of the registry

Every field of `data_registry.yaml`, made from the schema that reads it when this site was built.
How the parts play together: [the registry](../registry.md). An annotated file:
[data_registry.yaml](files/data_registry.md). An unknown key is an error.
"""
_SETTINGS = """\
# Settings of the stages

Every field of the YAML files that `--config` takes, made from the schemas that read them when this
site was built. A file may hold only what it changes. An unknown key is an error. The same values
with comments: {files}.
"""
_FILE = """\
# {name}

`{path}`, as it is in the repository.

```yaml
{text}```
"""


def generated(root: Path) -> Iterator[tuple[str, str]]:
    """Path below docs/ and Markdown of each page.

    Args:
        root: of the repository.
    """
    # The parts of the pipeline load torch; importing this module does not.
    from pipeline.cli.app import app
    from pipeline.data.registry import Registry

    yield "reference/commands.md", command_reference(app)
    yield "reference/registry.md", "\n".join([_REGISTRY, *describe(Registry)])
    yield "reference/settings.md", _settings(root)
    for path in [root / "data_registry.yaml", *sorted((root / "stages").glob("*.yaml"))]:
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        yield links.page_of(name), _FILE.format(name=path.name, path=name, text=text)
    for source in ("CHANGELOG.md", "CONTRIBUTING.md"):
        yield links.page_of(source), (root / source).read_text(encoding="utf-8")


def _settings(root: Path) -> str:
    from pipeline.engine.parts import SlurmSettings
    from pipeline.setup.submit import SubmitSettings
    from stages.cache_teachers import CacheTeachersConfig
    from stages.evaluate import EvaluateConfig
    from stages.export import ExportConfig
    from stages.predict import PredictConfig
    from stages.train_student import TrainStudentConfig
    from stages.train_teachers import TrainTeachersConfig

    models: dict[str, type[BaseModel]] = {
        "train-teachers": TrainTeachersConfig,
        "cache-teachers": CacheTeachersConfig,
        "train-student": TrainStudentConfig,
        "predict": PredictConfig,
        "evaluate": EvaluateConfig,
        "export": ExportConfig,
        "submit --slurm-config": SubmitSettings,
        "cache-teachers --slurm-config": SlurmSettings,
    }
    names = sorted(path.stem for path in (root / "stages").glob("*.yaml"))
    files = ", ".join(f"[{name}](files/{name}.md)" for name in names)
    parts = [_SETTINGS.format(files=files)]
    for command, model in models.items():
        parts.append(f"## {command}\n")
        parts += describe(model, anchor=command)
    return "\n".join(parts)
