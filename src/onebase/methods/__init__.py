"""Methods: one file each. A file registers its class; names are listed without importing torch."""

from onebase.methods.registry import all_methods, method_names, parse_method, register

__all__ = ["all_methods", "method_names", "parse_method", "register"]
