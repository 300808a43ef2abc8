"""Measurements of HybriMoE and of its peers. They return data; `hybrimoe.cli.bench` shows it.

Every figure is a median over alternating rounds with its spread, says on which machine it was taken, and whether it was
measured, emulated or simulated.
"""
