"""The loopback world: providers, a Roark receiver and callers on this machine.

Development only. Nothing outside this folder imports it: delete it and the bot still works.
Everything binds to 127.0.0.1.
"""
