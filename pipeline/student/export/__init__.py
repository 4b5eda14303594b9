"""A student as files for other programs, each held against what `pipeline predict` says."""
