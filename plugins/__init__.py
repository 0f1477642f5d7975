"""Faster bodies for the ops of ``graphs``; deleting this folder leaves a slower, working tool."""
