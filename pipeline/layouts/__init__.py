"""Folders of other tools: what is a dataset or a teacher there, in the words of a registry."""
