"""Calls of tools and thoughts in a model's answers, told apart as they come; docs/tools.md shows it from outside."""
