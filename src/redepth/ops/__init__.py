"""Kernels: a readable reference beside each fast one, one entry point each."""

from .scan import linear_scan, linear_scan_reference

__all__ = ["linear_scan", "linear_scan_reference"]
