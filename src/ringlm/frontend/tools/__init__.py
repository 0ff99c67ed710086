"""Calls of tools and reasoning in a model's answers, told apart as they come; docs/tools.md shows it from outside."""
