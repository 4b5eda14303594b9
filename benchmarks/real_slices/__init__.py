"""Supervisions compared on real CT slices: each organ annotated by one hospital, tested on another.

The data are not part of this repository; README.md beside this file says what they are.
"""
