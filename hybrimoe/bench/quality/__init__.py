"""Measures what quantisation and lossy policies cost in quality."""
