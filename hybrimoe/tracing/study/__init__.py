"""Traces and simulations as answers: analyses, plans of a deployment, reports and plots."""
