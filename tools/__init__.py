"""Thin command lines over the package; each names its command in its first lines."""
