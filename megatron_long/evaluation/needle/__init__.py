"""Needle in a haystack: tasks, cases, scores, report."""
