"""Measures decoding and prefill of whole models beside other programs."""
