"""Measurements of the product, each against servers and a simulator of its own. Nothing deployed imports them."""
