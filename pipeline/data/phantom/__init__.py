"""The embedded phantom: procedural abdominal CT with labels, as real NIfTI files."""

from pipeline.data.phantom.case import ORGANS, PhantomCase, PhantomSpec, case_names, make_case
from pipeline.data.phantom.files import write_dataset

__all__ = ["ORGANS", "PhantomCase", "PhantomSpec", "case_names", "make_case", "write_dataset"]
