"""The embedded phantom: procedural abdominal CT with labels, as real NIfTI files."""

from pipeline.data.phantom.case import PhantomCase, make_case
from pipeline.data.phantom.files import write_dataset
from pipeline.data.phantom_spec import ORGANS, PhantomSpec, case_names

__all__ = ["ORGANS", "PhantomCase", "PhantomSpec", "case_names", "make_case", "write_dataset"]
