"""The servers a bot talks to, each speaking its provider's own protocol. One file per wire."""
