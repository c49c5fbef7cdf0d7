"""How the bot is run: in a process of its own, or under the base image's contract."""
