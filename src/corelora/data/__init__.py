"""Rows from anywhere, checked by file and line, turned into text, and text into tokens."""

from corelora.data.check import check_data
from corelora.data.forms import FORMS
from corelora.data.glue import GLUE
from corelora.data.sources import Rows, read_rows

__all__ = ["FORMS", "GLUE", "Rows", "check_data", "read_rows"]
