"""Public door of the linear recurrence; the code stands in `modeling.scan`, where exported models can reach it."""

from ..modeling.scan import linear_scan, linear_scan_reference

__all__ = ["linear_scan", "linear_scan_reference"]
