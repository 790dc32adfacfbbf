"""Evaluation: exams, comparison of models, statistics."""
