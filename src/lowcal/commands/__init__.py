"""The commands: their options, what they call, what they print."""
