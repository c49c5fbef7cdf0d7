"""How the bot behaves with people: turns, silence, endings, recovery from what fails.

Where a number here is the benchmark's, it was measured by benchmarks/conversation.py of the
template.
"""
