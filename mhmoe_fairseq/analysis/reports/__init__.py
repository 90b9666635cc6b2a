"""Reports on trained models, made of their records and training logs."""

from .paper import PaperTable
from .report import write_report

__all__ = ["PaperTable", "write_report"]
