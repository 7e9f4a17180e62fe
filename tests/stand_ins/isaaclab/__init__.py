"""Stands for Isaac Lab 3.0."""
