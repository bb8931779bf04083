"""Whether Graph's limits are used to the full, never crossed and shared fairly, as Graph itself saw it.

Each experiment runs a whole fleet against the simulator and judges it by the simulator's journal alone: when each
request came, for which mailbox, and when its answer left. Nothing is taken from what the fleet says of itself.
"""
