"""How the bot behaves with people: turns, silence, endings, recovery from what fails."""
