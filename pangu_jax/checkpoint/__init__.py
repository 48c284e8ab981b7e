"""Checkpoints in and out.

Folders are hostile until checked: no pickle, no remote code, sizes before allocation.
"""
