"""Judges, which decide which of two responses to a prompt is better; see `protocol.Judge`."""
