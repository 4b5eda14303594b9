"""The embedded phantom: procedural abdominal CT with labels, as real NIfTI files."""
