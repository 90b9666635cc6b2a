"""Reports on trained models, made of their records and training logs."""

from .report import write_report
from .tables import PaperTable

__all__ = ["PaperTable", "write_report"]
