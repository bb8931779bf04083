"""The demo: mailfleet does its main job for real on this machine, and shows what became of every mail.

It uses what any application may use: it publishes over AMQP, listens to the events, and reads the tables. What was
really delivered it asks the simulated Graph, so that it cannot be fooled by what mailfleet believes of itself.
"""
