"""What the process needs, whoever is on the line: its log, traces, signals."""
