"""The documentation as a site: `mkdocs.yml` names `hook.py`, which makes the pages of reference."""
