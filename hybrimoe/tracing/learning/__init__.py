"""Predictors that are trained on recorded routing."""
